"""PyramidDrop: at three depths, the same share of the visual tokens goes.

Method: PyramidDrop (arXiv:2410.17247): at a quarter, a half and three quarters of the layers,
ranked by the attention of the last instruction token (mean over heads). Differs from the release:
the weights are those of the layer just run, not of the next one's projections; positions stay.
"""

from typing import Any

import torch
from torch import Tensor

from vllm_covipal.baselines import inside
from vllm_covipal.core.budget import kept_tokens
from vllm_covipal.hf import EncodedPrompt
from vllm_covipal.selectors.base import top_places

NUM_STAGES = 4
NUM_BISECTIONS = 60


def stage_layers(num_layers: int) -> list[int]:
    """The layers before which tokens go: a quarter, a half, three quarters of the way."""
    return [round(num_layers * stage / NUM_STAGES) for stage in range(1, NUM_STAGES)]


def stage_share(num_layers: int, keep_ratio: float, *, is_average: bool) -> float:
    """Share that each stage keeps of the one before.

    Raises:
        Unreachable: if the first stage alone is above the average.
    """
    if not is_average:
        return float(keep_ratio ** (1 / (NUM_STAGES - 1)))
    bounds = [0, *stage_layers(num_layers), num_layers]
    sizes = [end - start for start, end in zip(bounds, bounds[1:], strict=False)]
    if sizes[0] / num_layers >= keep_ratio:
        raise inside.Unreachable(
            f"{sizes[0]} of {num_layers} layers see all visual tokens: {keep_ratio} is out of reach"
        )
    low, high = 0.0, 1.0
    for _ in range(NUM_BISECTIONS):
        share = (low + high) / 2
        mean = sum(size * share**i for i, size in enumerate(sizes)) / num_layers
        low, high = (share, high) if mean < keep_ratio else (low, share)
    return high


def answer(
    model: Any, encoded: EncodedPrompt, keep_ratio: float, max_new_tokens: int, *, is_average: bool
) -> tuple[list[int], float]:
    """As ``baselines.INSIDE``; see ``inside.answer``.

    Raises:
        Unreachable: if the average cannot be met.
    """
    num_layers = len(model.model.language_model.layers)
    share = stage_share(num_layers, keep_ratio, is_average=is_average)
    stages = stage_layers(num_layers)
    (item,) = encoded.items
    total = len(item.rows)
    if item.structure_mask is not None:
        total -= int(item.structure_mask.sum())

    def drop(state: inside.LayerState) -> Tensor | None:
        if state.layer_idx not in stages:
            return None
        stage = stages.index(state.layer_idx) + 1
        num_kept = min(len(state.visual), kept_tokens(total, round(share**stage, 9)))
        if num_kept == len(state.visual):
            return torch.arange(num_kept)
        return top_places(inside.last_prompt_row(state, state.visual), num_kept)

    return inside.answer(model, encoded, drop, max_new_tokens)

"""SparseVLM: at three depths, the visual tokens that the picture's own words attend to.

Method: SparseVLM (arXiv:2410.04417): raters are text tokens more similar to the picture than the
mean (softmax over text of visual x text embeddings, mean over visual tokens); tokens are ranked by
the raters' mean attention. As the release's 2.0: fixed counts, original positions, no recycling of
what is dropped. Its 32-layer model drops at layers 2, 6 and 15 and keeps 52 %, 33 % and 19 % of
576 tokens for an average of 33 %; here the same depths and proportions, scaled to the budget.
"""

from typing import Any

import torch
from torch import Tensor

from vllm_covipal.baselines import inside
from vllm_covipal.core.budget import kept_tokens
from vllm_covipal.hf import EncodedPrompt
from vllm_covipal.selectors.base import top_places

DEPTHS = (2 / 32, 6 / 32, 15 / 32)
PROPORTIONS = (300 / 110, 200 / 110, 1.0)
"""Of the last stage's count, as the release keeps 300, 200, 110 of 576."""


def stage_layers(num_layers: int) -> list[int]:
    """The layers before which tokens go, distinct; fewer than three in a model of few layers."""
    layers: list[int] = []
    for depth in DEPTHS:
        layers.append(max(round(num_layers * depth), layers[-1] + 1 if layers else 1))
    return [layer for layer in layers if layer < num_layers]


def stage_shares(num_layers: int, keep_ratio: float, *, is_average: bool) -> list[float]:
    """Share of all visual tokens that each stage keeps.

    Raises:
        Unreachable: if the layers before the first stage are above the average.
    """
    last = keep_ratio
    stages = stage_layers(num_layers)
    proportions = PROPORTIONS[-len(stages) :]
    if is_average:
        bounds = [*stages, num_layers]
        sizes = [end - start for start, end in zip(bounds, bounds[1:], strict=False)]
        left = keep_ratio * num_layers - bounds[0]
        if left <= 0:
            raise inside.Unreachable(
                f"{bounds[0]} of {num_layers} layers see all visual tokens: {keep_ratio} is out "
                "of reach"
            )
        low, high = 0.0, 1.0
        for _ in range(60):
            last = (low + high) / 2
            used = sum(s * min(1, p * last) for s, p in zip(sizes, proportions, strict=True))
            low, high = (last, high) if used < left else (low, last)
    return [round(min(1.0, proportion * last), 9) for proportion in proportions]


def text_raters(visual: Tensor, text: Tensor) -> Tensor:
    """True for the text tokens that rate. [T].

    Args:
        visual: embeddings, [V, D].
        text: embeddings, [T, D].
    """
    relevance = (visual.float() @ text.float().T).softmax(-1).mean(0)
    return relevance > relevance.mean()


def answer(
    model: Any, encoded: EncodedPrompt, keep_ratio: float, max_new_tokens: int, *, is_average: bool
) -> tuple[list[int], float]:
    """As ``baselines.INSIDE``; see ``inside.answer``.

    Raises:
        Unreachable: if the average cannot be met.
    """
    num_layers = len(model.model.language_model.layers)
    stages = stage_layers(num_layers)
    shares = stage_shares(num_layers, keep_ratio, is_average=is_average)
    (item,) = encoded.items
    structure = item.structure_mask
    rows = item.rows if structure is None else item.rows[~structure]
    after = item.start + len(item.rows)
    with torch.no_grad():
        text = model.get_input_embeddings()(encoded.prompt_ids[after:])
    is_rater = text_raters(rows, text)

    def drop(state: inside.LayerState) -> Tensor | None:
        if state.layer_idx not in stages:
            return None
        num_kept = kept_tokens(len(rows), shares[stages.index(state.layer_idx)])
        if num_kept >= len(state.visual):
            return torch.arange(len(state.visual))
        raters = torch.arange(state.num_prompt - len(text), state.num_prompt)[is_rater]
        rating = state.attention[raters][:, state.visual].mean(0)
        return top_places(rating, num_kept)

    return inside.answer(model, encoded, drop, max_new_tokens)

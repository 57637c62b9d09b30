"""FastV: after layer K, the visual tokens that the prompt's last token attends to most.

Method: FastV (arXiv:2403.06764), K = 2: mean over heads of layer K - 1's attention, original
positions kept. The released code's choice at K = 2.
"""

from typing import Any

from torch import Tensor

from vllm_covipal.baselines import inside
from vllm_covipal.core.budget import kept_tokens
from vllm_covipal.hf import EncodedPrompt
from vllm_covipal.selectors.base import top_places

FIRST_PRUNED_LAYER = 2


def answer(
    model: Any, encoded: EncodedPrompt, keep_ratio: float, max_new_tokens: int, *, is_average: bool
) -> tuple[list[int], float]:
    """As ``baselines.INSIDE``; see ``inside.answer``.

    Raises:
        Unreachable: if the average cannot be met.
    """
    num_layers = len(model.model.language_model.layers)
    share = keep_ratio
    if is_average:
        share = inside.share_for_average(num_layers, FIRST_PRUNED_LAYER, keep_ratio)

    def drop(state: inside.LayerState) -> Tensor | None:
        if state.layer_idx != FIRST_PRUNED_LAYER:
            return None
        num_kept = kept_tokens(len(state.visual), share)
        return top_places(inside.last_prompt_row(state, state.visual), num_kept)

    return inside.answer(model, encoded, drop, max_new_tokens)

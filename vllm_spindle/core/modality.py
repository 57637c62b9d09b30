"""Visual tokens may count for less than text: the deeper the band, the smaller their share.

Shapes: C context tokens, K kv heads, G query heads per kv head; [...] is [K] or [K, G].
Method: ours, for CoViPAL's layer-wise idea (arXiv:2508.17243, pruning deeper in the model) on the
cache's side. The budget is untouched: what visual tokens give up goes to text.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class VisualCap:
    """Which prompt tokens are visual, and how many of them a layer may keep.

    Attributes:
        mask: True = visual. [T] bool, T prompt tokens.
        share: of what would be proportional, [0, 1].
    """

    mask: Tensor
    share: float


def max_visual_tokens(num_kept: int, num_visual: int, num_context: int, share: float) -> int:
    """Visual tokens that may be kept: ``share`` of their proportional part, rounded down.

    For example 100 of 400 tokens kept, 200 visual, share 0.5: 50 would be proportional, 25 may be.
    """
    return int(share * num_kept * num_visual / num_context) if num_context else 0


def cap_visual(ranked: Tensor, is_visual: Tensor, max_visual: int) -> Tensor:
    """The ranking with its visual tokens beyond the first ``max_visual`` moved behind the rest.

    They stay in order at the end, so that they are taken where text runs out.

    Args:
        ranked: all context positions, the most important first. [..., C], int64.
        is_visual: [C], bool.
        max_visual: visual tokens that keep their place.

    Returns:
        [..., C], int64.
    """
    visual = is_visual[ranked]
    excess = visual & (visual.cumsum(dim=-1) > max_visual)
    order = excess.to(torch.uint8).argsort(dim=-1, stable=True)
    return ranked.gather(-1, order)

"""DivPrune: the rows that are most unlike each other.

Shapes: C candidates, K to keep, D width.
Method: DivPrune (arXiv:2503.02175), max-min diversity over 1 - cosine by farthest-point greedy,
as released: the first pick is the row whose nearest neighbour is farthest. Text-blind.
"""

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from vllm_covipal.core.visual_item import VisualItem
from vllm_covipal.selectors.base import Selector, unit_rows
from vllm_covipal.selectors.cosines import Cosines

BEYOND_ANY_COSINE = 2.0


def farthest_points(unit: Tensor, num_kept: int) -> Tensor:
    """Greedy max-min choice.

    Args:
        unit: rows of length one. [C, D], float32.
        num_kept: K, 1 <= K <= C.

    Returns:
        Places in the order of choice. [K], int64.
    """
    cosines = Cosines(unit)
    nearest = cosines.to_nearest_neighbour()
    picks = torch.empty(num_kept, dtype=torch.int64, device=unit.device)
    for i in range(num_kept):
        pick = nearest.argmin(0, keepdim=True)  # the first of equals
        picks[i : i + 1] = pick
        row = cosines.row(pick)
        nearest = row if i == 0 else torch.maximum(nearest, row, out=nearest)
        nearest.index_fill_(0, pick, BEYOND_ANY_COSINE)
    return picks


class DivPruneSelector(Selector):
    """Max-min diversity of the projector's rows, all crops of an item together."""

    name: ClassVar[str] = "divprune"
    uses_text: ClassVar[bool] = False

    def _choose(self, items: Sequence[VisualItem]) -> list[Tensor]:
        return [farthest_points(unit_rows(item.candidates()), item.num_kept) for item in items]

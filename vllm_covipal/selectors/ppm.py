"""The pruning module's choice: the rows that it scores highest for this text, and some others.

Shapes: C candidates of an item, K to keep.
"""

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from vllm_covipal.core.pruner import PruningModule
from vllm_covipal.core.visual_item import VisualItem
from vllm_covipal.selectors.base import Selector, top_places
from vllm_covipal.selectors.grid import spread


class PpmSelector(Selector):
    """Top-scored rows of a trained ``PruningModule`` (CoViPAL, arXiv:2508.17243).

    Ours beside the paper's: a share of them, ``spread_share`` of its configuration, is taken
    evenly from the others.
    """

    name: ClassVar[str] = "ppm"
    uses_text: ClassVar[bool] = True

    def __init__(self, pruning_module: PruningModule) -> None:
        """Args: pruning_module: on the device where the items will be."""
        self.pruning_module = pruning_module

    def _choose(self, items: Sequence[VisualItem]) -> list[Tensor]:
        scores = self.pruning_module.score_items(
            [item.candidates() for item in items], [item.text for item in items]
        )
        share = self.pruning_module.config.spread_share
        return [
            top_and_spread(of_item, item.num_kept, int(share * item.num_kept))
            for of_item, item in zip(scores, items, strict=True)
        ]


def top_and_spread(scores: Tensor, num_kept: int, num_spread: int) -> Tensor:
    """Places of the highest scores, and some spread evenly over the others.

    Args:
        scores: [C].
        num_kept: K < C, of both kinds.
        num_spread: of the second, less than K.

    Returns:
        [K], int64.
    """
    order = top_places(scores, len(scores))
    num_top = num_kept - num_spread
    others = order[num_top:].sort().values
    spread_over = torch.tensor(spread(len(others), num_spread), dtype=torch.int64)
    return torch.cat([order[:num_top], others[spread_over.to(scores.device)]])

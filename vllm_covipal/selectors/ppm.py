"""The pruning module's choice: the rows that it scores highest for this text, and some others.

Shapes: C candidates of an item, K to keep.
"""

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from vllm_covipal.core.pruner import PruningModule
from vllm_covipal.core.visual_item import VisualItem
from vllm_covipal.selectors.base import Selector, top_places, unit_rows
from vllm_covipal.selectors.cdpruner import greedy_map
from vllm_covipal.selectors.grid import spread


class PpmSelector(Selector):
    """Top-scored rows of a trained ``PruningModule`` (CoViPAL, arXiv:2508.17243).

    Ours beside the paper's: a share of them, ``spread_share`` of its configuration, is taken from
    the others, evenly or for diversity.
    """

    name: ClassVar[str] = "ppm"
    uses_text: ClassVar[bool] = True

    def __init__(self, pruning_module: PruningModule) -> None:
        """Args: pruning_module: on the device where the items will be."""
        self.pruning_module = pruning_module
        self.max_text_tokens = pruning_module.config.max_text_tokens

    def _choose(self, items: Sequence[VisualItem]) -> list[Tensor]:
        scores = self.pruning_module.score_items(
            [item.candidates() for item in items], [item.text for item in items]
        )
        return [self._of_item(*each) for each in zip(items, scores, strict=True)]

    def _of_item(self, item: VisualItem, scores: Tensor) -> Tensor:
        config = self.pruning_module.config
        num_spread = int(config.spread_share * item.num_kept)
        if config.spread_by == "even" or not num_spread:
            return top_and_spread(scores, item.num_kept, num_spread)
        top = top_places(scores, item.num_kept - num_spread)
        unit = unit_rows(item.candidates())
        # What is farthest from the span of all that is kept so far, as CDPruner has it.
        return greedy_map(unit, unit.new_ones(len(unit)), item.num_kept, start=top)


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

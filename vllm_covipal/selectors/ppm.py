"""The pruning module's choice: the rows that it scores highest for this text."""

from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor

from vllm_covipal.core.pruner import PruningModule
from vllm_covipal.core.visual_item import VisualItem
from vllm_covipal.selectors.base import Selector, top_places


class PpmSelector(Selector):
    """Top-scored rows of a trained ``PruningModule`` (CoViPAL, arXiv:2508.17243)."""

    name: ClassVar[str] = "ppm"
    uses_text: ClassVar[bool] = True

    def __init__(self, pruning_module: PruningModule) -> None:
        """Args: pruning_module: on the device where the items will be."""
        self.pruning_module = pruning_module

    def _choose(self, items: Sequence[VisualItem]) -> list[Tensor]:
        scores = self.pruning_module.score_items(
            [item.candidates() for item in items], [item.text for item in items]
        )
        return [
            top_places(of_item, item.num_kept) for of_item, item in zip(scores, items, strict=True)
        ]

"""What a selector is: items in, rows out, each item's choice its own.

Shapes: N rows of an item, C candidates, K to keep, D width.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from vllm_covipal.core.text_context import MAX_TEXT_TOKENS
from vllm_covipal.core.visual_item import VisualItem, with_structure


class Selector(ABC):
    """Chooses the rows of visual items that reach the language model.

    A choice depends on the item alone: not on its batch mates, not on global random state. It is
    made in float32, and the lower index wins a tie.
    """

    name: ClassVar[str]
    uses_text: ClassVar[bool]
    """Whether another text context may change the choice: if so, it belongs in cache keys."""
    max_text_tokens: int = MAX_TEXT_TOKENS
    """Length of the text context that it is to be given, where the user does not say."""

    def select(self, items: Sequence[VisualItem]) -> list[Tensor]:
        """Rows to keep of each item, structure rows included.

        Returns:
            Ascending indices per item, [S + num_kept], int64, on the item's device.
        """
        pruned = [item for item in items if 0 < item.num_kept < item.num_candidates]
        chosen = iter(self._choose(pruned) if pruned else [])
        return [
            with_structure(
                item,
                next(chosen)
                if 0 < item.num_kept < item.num_candidates
                else torch.arange(item.num_kept),
            )
            for item in items
        ]

    @abstractmethod
    def _choose(self, items: Sequence[VisualItem]) -> list[Tensor]:
        """Places among the candidates, per item; here 0 < num_kept < C. [K], any order."""


def unit_rows(embeddings: Tensor) -> Tensor:
    """Rows of length one, so that products are cosines; a zero row stays zero. float32."""
    return F.normalize(embeddings.float(), dim=-1)


def top_places(scores: Tensor, num_kept: int) -> Tensor:
    """Places of the highest scores, the lower place first among equals.

    ``torch.topk`` does not say which of equals it takes.

    Args:
        scores: [C].
        num_kept: K.

    Returns:
        [K], int64, best first.
    """
    return scores.sort(descending=True, stable=True).indices[:num_kept]

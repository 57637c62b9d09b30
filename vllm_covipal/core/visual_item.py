"""One mm_item as a selector sees it: its visual rows, the text context, its geometry.

Shapes: N rows of the item, S structure rows among them, C = N - S candidates, T text tokens, D
width of the language model. A structure row (a newline, a separator) is always kept and is
never a candidate.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False)
class VisualItem:
    """What a selector may know of one image or video.

    Attributes:
        visual: the projector's rows in the order in which the language model sees them,
            structure rows included. [N, D].
        text: embeddings of the text context; T may be 0. [T, D].
        structure_mask: True = structure row. [N] bool, or None where there are none.
        grids: (rows, cols) of each crop or frame that the candidates fill in order, row by row;
            empty where unknown.
        num_kept: candidates to keep, from ``budget.kept_tokens``. 0 <= num_kept <= C.
    """

    visual: Tensor
    text: Tensor
    structure_mask: Tensor | None
    grids: tuple[tuple[int, int], ...]
    num_kept: int

    def __post_init__(self) -> None:
        """Refuse what does not fit together.

        Raises:
            ValueError: if a shape, a grid or the count contradicts the others.
        """
        num_rows, width = self.visual.shape
        if self.text.dim() != 2 or self.text.shape[1] != width:
            raise ValueError(f"text must be [T, {width}] as visual, got {list(self.text.shape)}")
        mask = self.structure_mask
        if mask is not None and (mask.dtype != torch.bool or mask.shape != (num_rows,)):
            raise ValueError(
                f"structure_mask must be [{num_rows}] bool, got {list(mask.shape)} {mask.dtype}"
            )
        num_candidates = self.num_candidates
        if not 0 <= self.num_kept <= num_candidates:
            raise ValueError(f"num_kept must be in [0, {num_candidates}], got {self.num_kept}")
        if self.grids and sum(rows * cols for rows, cols in self.grids) != num_candidates:
            raise ValueError(f"grids {self.grids} do not hold {num_candidates} candidates")

    @property
    def num_candidates(self) -> int:
        """Rows that may be pruned (C)."""
        if self.structure_mask is None:
            return int(self.visual.shape[0])
        return int(self.visual.shape[0]) - int(self.structure_mask.sum())

    def candidate_rows(self) -> Tensor:
        """Row index of each candidate, ascending. [C], int64."""
        if self.structure_mask is None:
            return torch.arange(self.visual.shape[0], device=self.visual.device)
        return (~self.structure_mask).nonzero().squeeze(1).to(self.visual.device)

    def candidates(self) -> Tensor:
        """The candidates' embeddings. [C, D]."""
        if self.structure_mask is None:
            return self.visual
        return self.visual.index_select(0, self.candidate_rows())


def with_structure(item: VisualItem, kept_candidates: Tensor) -> Tensor:
    """Rows of the item to keep: the structure rows and the chosen candidates.

    Args:
        item: the item.
        kept_candidates: places among the candidates, [0, C), any order, distinct. [K], int64.

    Returns:
        Ascending row indices, [S + K], int64, on the device of ``item.visual``.
    """
    chosen = kept_candidates.to(item.visual.device, torch.int64)
    if item.structure_mask is None:
        return chosen.sort().values
    structure = item.structure_mask.nonzero().squeeze(1).to(item.visual.device)
    return torch.cat([structure, item.candidate_rows()[chosen]]).sort().values

"""Rows spread evenly over the picture: the other baseline, blind to content.

Integer arithmetic throughout: counts are shared out by rounding running sums, so that each share
is its quota rounded down or up and the odd ones do not gather at one end.
"""

import math
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from vllm_covipal.core.visual_item import VisualItem
from vllm_covipal.selectors.base import Selector


def spread(num_places: int, num_kept: int) -> list[int]:
    """``num_kept`` of ``num_places`` places in a row, each in the middle of its share.

    For example two of eight: [2, 6].
    """
    return [(2 * i + 1) * num_places // (2 * num_kept) for i in range(num_kept)]


def share_by_size(sizes: Sequence[int], num_kept: int) -> list[int]:
    """``num_kept`` shared out in proportion, no share above its size."""
    total = sum(sizes)
    marks, seen = [0], 0
    for size in sizes:
        seen += size
        marks.append((2 * seen * num_kept + total) // (2 * total))
    return [end - start for start, end in zip(marks, marks[1:], strict=False)]


def grid_places(rows: int, cols: int, num_kept: int) -> list[int]:
    """Exactly ``num_kept`` cells of a grid, spaced alike down and across, ascending.

    As many lines are used as make the spacing square; each gets its share of the cells.
    """
    if num_kept == 0:
        return []
    num_lines = round(math.sqrt(num_kept * rows / cols))
    num_lines = min(max(num_lines, -(-num_kept // cols), 1), rows, num_kept)
    per_line = share_by_size([cols] * num_lines, num_kept)
    return [
        row * cols + col
        for row, kept in zip(spread(rows, num_lines), per_line, strict=True)
        for col in spread(cols, kept)
    ]


class GridSelector(Selector):
    """The same density over every crop or frame; without grids, over the row of candidates."""

    name: ClassVar[str] = "grid"
    uses_text: ClassVar[bool] = False

    def _choose(self, items: Sequence[VisualItem]) -> list[Tensor]:
        return [torch.tensor(self._places(item)) for item in items]

    def _places(self, item: VisualItem) -> list[int]:
        grids = item.grids or ((1, item.num_candidates),)
        sizes = [rows * cols for rows, cols in grids]
        places, start = [], 0
        for (rows, cols), kept in zip(grids, share_by_size(sizes, item.num_kept), strict=True):
            places += [start + place for place in grid_places(rows, cols, kept)]
            start += rows * cols
        return places

"""Cosines among an item's rows, held as one matrix where that is small.

Shapes: C candidates, D width.
"""

import torch
from torch import Tensor

MAX_MATRIX_ROWS = 8192
"""Above this the matrix would pass 256 MiB, and each row is computed when it is asked for."""

BLOCK_ROWS = 1024

NUM_STRIPES = 6
"""Of the matrix, which is symmetric: computed from the diagonal on, 7/12 of the products."""


class Cosines:
    """Rows of the matrix of cosines of C unit rows."""

    def __init__(self, unit: Tensor) -> None:
        """Args: unit: rows of length one. [C, D], float32."""
        self._unit = unit
        self._matrix = _symmetric(unit) if unit.shape[0] <= MAX_MATRIX_ROWS else None

    def row(self, place: Tensor) -> Tensor:
        """Cosines of one row with every row, a new tensor. ``place`` is [1]. [C]."""
        if self._matrix is not None:
            return self._matrix.index_select(0, place).squeeze(0)
        return self._unit @ self._unit.index_select(0, place).squeeze(0)

    def to_nearest_neighbour(self) -> Tensor:
        """Each row's largest cosine with another row. [C]."""
        nearest = []
        for start in range(0, self._unit.shape[0], BLOCK_ROWS):
            rows = slice(start, start + BLOCK_ROWS)
            if self._matrix is not None:
                block = self._matrix[rows].clone()
            else:
                block = self._unit[rows] @ self._unit.T
            block.diagonal(start).fill_(-torch.inf)
            nearest.append(block.amax(1))
        return torch.cat(nearest)


def _symmetric(unit: Tensor) -> Tensor:
    """``unit @ unit.T``, the half below the diagonal copied. [C, C]."""
    num_rows = unit.shape[0]
    matrix = unit.new_empty(num_rows, num_rows)
    stripe = max(-(-num_rows // NUM_STRIPES), 1)
    for start in range(0, num_rows, stripe):
        end = min(start + stripe, num_rows)
        matrix[start:end, start:] = unit[start:end] @ unit[start:].T
        matrix[end:, start:end] = matrix[start:end, end:].T
    return matrix

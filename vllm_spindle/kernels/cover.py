"""Codebooks, fast: products by torch, everything else compiled (``numba_cover.py``).

Shapes: C context tokens, N vectors, M of them in a part, E entries so far, D head size, K kv heads.
Slow twin: ``core.codebook.Book``, whose results these are, but for vectors so close to the
threshold that the order of a float32 sum decides.

A part is multiplied once, with the entries and itself. Products are bfloat16 where the machine has
instructions for it. They only sift: in bfloat16 a cosine of 0.979 rounds to 0.980 and would count
as above 0.98, so whatever lies within the rounding of a decision is multiplied again in float32.
They are read as integers, which compare as their floats do where those are positive: 32 at a time
and without a copy.
"""

from functools import lru_cache

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from vllm_spindle.core.admission import Admitted, admit
from vllm_spindle.core.codebook import UNCOVERED, Book
from vllm_spindle.kernels.numba_cover import Limits, Sources, Tables, add_part, similarity

ROUND = 128
WINDOW = 1024  # vectors of a full cover's part: their graph, a byte a pair, stays in the cache
# Rounding of both factors (2 ** -9 each) and of the product (2 ** -9), and the sum's own.
BF16_MARGIN = 0.0065
NEVER = np.iinfo(np.int32).max  # above any product's integer


class CompiledBook(Book):
    """``core.codebook.Book``, fast."""

    def __init__(self, vectors: Tensor, threshold: float, capacity: int | None = None) -> None:
        super().__init__(vectors, threshold, capacity)
        # So near to zero a rough product may be negative, whose integers are in reverse.
        dtype = _product_dtype() if threshold > BF16_MARGIN else torch.float32
        self._margin = BF16_MARGIN if dtype == torch.bfloat16 else 0.0
        self._rough = self.directions.to(dtype)
        self._rough_table = self._rough.new_zeros(
            _round_up(self._capacity + ROUND), vectors.shape[1]
        )

    def add(self, part: Tensor) -> Tensor:
        """See ``Book.add``."""
        if not len(part):
            return part
        products = self._products(part)  # and with it the rough table may have grown
        self.num_entries = add_part(
            _integers(products),
            part.numpy(),
            Sources(self.directions.numpy(), _integers(self._rough)),
            Tables(self.codes.numpy(), self._table.numpy(), _integers(self._rough_table)),
            self.num_entries,
            _limits(self._threshold, self._margin),
        )
        return part[self.codes[part] != UNCOVERED]

    def _products(self, part: Tensor) -> Tensor:
        """Rough cosines of a part with the entries and, where there is room, with itself.

        [at least M, at least E + M].
        """
        rows = self._rough[functional.pad(part, (0, _round_up(len(part)) - len(part)))]
        width = self.num_entries
        if self.has_room:
            width += len(part)
            self._grow(_round_up(width))
            self._rough_table[self.num_entries : width] = rows[: len(part)]
        return rows @ self._rough_table[: _round_up(width)].T

    def _grow(self, size: int) -> None:
        more = size - len(self._rough_table)
        if more > 0:
            self._rough_table = functional.pad(self._rough_table, (0, 0, 0, more))

    def _similarity(self, coded: Tensor) -> Tensor:
        where = (coded.numpy(), self.codes.numpy())
        return torch.from_numpy(similarity(self.directions.numpy(), self._table.numpy(), *where))


def admit_layer(
    keys: Tensor,
    values: Tensor,
    ranked: Tensor,
    thresholds: tuple[float, float],
    capacity: tuple[int, int, int],
) -> list[Admitted]:
    """One layer's context merged into what its region has room for, per kv head.

    Args:
        keys: without rotation. [K, C, D].
        values: [K, C, D].
        ranked: tokens, the most important first. [K, C].
        thresholds: for keys and for values.
        capacity: of each head; see ``admit``.
    """
    heads = zip(keys, values, ranked, strict=True)
    return [admit(*head, thresholds, capacity, CompiledBook) for head in heads]


def _round_up(count: int) -> int:
    """To few different shapes: oneDNN compiles a product's code for each, a millisecond a time."""
    return -(-count // ROUND) * ROUND


@lru_cache(maxsize=1)
def _product_dtype() -> torch.dtype:
    return torch.bfloat16 if torch.cpu._is_avx512_bf16_supported() else torch.float32


@lru_cache(maxsize=16)
def _limits(threshold: float, margin: float) -> Limits:
    shift = 16 if margin else 0
    low, high = (
        int(np.float32(x).view(np.int32)) >> shift for x in (threshold - margin, threshold + margin)
    )
    if threshold >= 1:  # nothing is above it, whatever rounding says
        low = high = NEVER
    return Limits(np.float32(threshold), np.float32(margin), low, high, shift)


def _integers(rough: Tensor) -> np.ndarray:
    """The same memory as integers, which compare as their floats where those are positive."""
    return rough.view(torch.int16 if rough.dtype == torch.bfloat16 else torch.int32).numpy()

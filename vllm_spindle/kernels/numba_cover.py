"""Codebooks, fast: products by torch, the greedy choice compiled.

Shapes: K kv heads, C context tokens, M vectors of a part, E entries so far, D head size. Slow twin:
``core.codebook.Book``, whose results these are, but for vectors so close to the threshold that the
order of a float32 sum decides.

Products are bfloat16 where the machine has instructions for it. They only sift: in bfloat16 a
cosine of 0.979 rounds to 0.980 and would count as above 0.98, so whatever lies within the rounding
of a decision is multiplied again in float32.
"""

from functools import lru_cache, partial

import numpy as np
import torch
from numba import njit
from torch import Tensor
from torch.nn import functional

from vllm_spindle.core.admission import Admitted, admit
from vllm_spindle.core.codebook import UNCOVERED, Book

ROUND = 128
WINDOW = 1024  # vectors of a full cover's part: their graph, a byte a pair, stays in the cache
# Rounding of both factors (2 ** -9 each) and of the product (2 ** -9), and the sum's own.
BF16_MARGIN = 0.0065
BLOCK = 64  # products passed over at once

# The reductions below are over finite numbers, so their order and NaN do not matter.
_compiled = partial(njit, cache=True, nogil=True, fastmath={"nnan", "nsz", "reassoc"})


class CompiledBook(Book):
    """``core.codebook.Book``, fast."""

    def __init__(self, vectors: Tensor, threshold: float, capacity: int | None = None) -> None:
        super().__init__(vectors, threshold, capacity)
        dtype = _product_dtype()
        self._rough = self.directions.to(dtype)
        self._rough_table = torch.zeros(_round_up(len(self._table)), vectors.shape[1], dtype=dtype)
        self._margin = np.float32(BF16_MARGIN if dtype == torch.bfloat16 else 0)

    def _nearest(self, part: Tensor) -> Tensor:
        entries = self._rough_table[: _round_up(self.num_entries)]
        return torch.from_numpy(
            nearest_entries(
                _products(self._rough_rows(part), entries, len(part), self.num_entries),
                self.directions[part].numpy(),
                self._table.numpy(),
                np.float32(self._threshold),
                self._margin,
            )
        )

    def _cover(self, part: Tensor, room: int) -> tuple[Tensor, Tensor]:
        rough = self._rough_rows(part)
        codes, members = greedy_members(
            _products(rough, rough, len(part), len(part)),
            self.directions[part].numpy(),
            np.float32(self._threshold),
            self._margin,
            room,
        )
        return torch.from_numpy(codes), torch.from_numpy(members)

    def _append(self, members: Tensor) -> None:
        first = self.num_entries
        super()._append(members)
        self._rough_table[first : self.num_entries] = self._rough[members]

    def _rough_rows(self, part: Tensor) -> Tensor:
        """The vectors at these indices, and some more to fill up."""
        return self._rough[functional.pad(part, (0, _round_up(len(part)) - len(part)))]


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


def _products(left: Tensor, right: Tensor, num_left: int, num_right: int) -> np.ndarray:
    """Products of the first rows of both. [num_left, num_right], float32."""
    return (left @ right.T)[:num_left, :num_right].float().contiguous().numpy()


@lru_cache(maxsize=1)
def _product_dtype() -> torch.dtype:
    return torch.bfloat16 if torch.cpu._is_avx512_bf16_supported() else torch.float32


@_compiled()
def _cosine(left, right):
    total = np.float32(0)
    for d in range(len(left)):
        total += left[d] * right[d]
    return min(total, np.float32(1))


@_compiled()
def nearest_entries(products, directions, entries, least, margin):
    """First of the nearest entries with a cosine above ``least``, or UNCOVERED.

    Args:
        products: rough cosines. [M, E].
        directions: [M, D].
        entries: [at least E, D].
        least: see above.
        margin: how far a rough cosine may be off; 0 for not at all.
    """
    num_rows, width = products.shape
    nearest = np.full(num_rows, UNCOVERED, np.int64)
    num_blocks = (width + BLOCK - 1) // BLOCK
    tops = np.empty(num_blocks, np.float32)  # largest of each block of a row
    for i in range(num_rows):
        row = products[i]
        peak = row[0]
        for block in range(num_blocks):
            top = row[block * BLOCK]
            for j in range(block * BLOCK, min(block * BLOCK + BLOCK, width)):
                top = max(top, row[j])
            tops[block] = top
            peak = max(peak, top)
        if min(peak, np.float32(1)) + margin <= least:
            continue
        best = least
        for block in range(num_blocks):
            if tops[block] < peak - 2 * margin:
                continue
            for j in range(block * BLOCK, min(block * BLOCK + BLOCK, width)):
                if row[j] < peak - 2 * margin:
                    continue
                cosine = min(row[j], np.float32(1))
                if margin > 0:
                    cosine = _cosine(directions[i], entries[j])
                if cosine > best:
                    best = cosine
                    nearest[i] = j
    return nearest


@_compiled()
def greedy_members(products, directions, threshold, margin, capacity):
    """Greedy cover of one window (Algorithm 1): take whoever has most open neighbours, repeat.

    Args:
        products: rough cosines of the window's open vectors. [M, M].
        directions: the vectors. [M, D].
        threshold: neighbours are above it; everyone is its own.
        margin: how far a rough cosine may be off; 0 for not at all.
        capacity: most members.

    Returns:
        Each vector's entry, UNCOVERED where there was no room, [M]; the members, [E]; int64.
    """
    count = len(products)
    graph = np.empty((count, count), np.uint8)
    degrees = np.empty(count, np.int32)  # open neighbours, itself included; -1 once covered
    for i in range(count):
        row, near = products[i], graph[i]
        num_doubtful = 0
        for j in range(count):
            near[j] = min(row[j], np.float32(1)) > threshold
            num_doubtful += abs(row[j] - threshold) < margin
        if num_doubtful:
            for j in range(count):
                if abs(row[j] - threshold) < margin:
                    near[j] = _cosine(directions[i], directions[j]) > threshold
        near[i] = 1
        degree = 0
        for j in range(count):
            degree += near[j]
        degrees[i] = degree
    codes = np.full(count, UNCOVERED, np.int64)
    members = np.empty(min(count, capacity), np.int64)
    num_members, peak, start = 0, 2, 0
    while num_members < capacity:
        # Degrees only fall: once the largest is 1, the rest are alone and come in order.
        member = -1
        if peak > 1:
            peak = 0
            for i in range(count):
                peak = max(peak, degrees[i])
            for i in range(count):
                if degrees[i] == peak:
                    member = i
                    break
            if peak <= 0:
                break
        else:
            for i in range(start, count):
                if degrees[i] > 0:
                    member, start = i, i + 1
                    break
            if member < 0:
                break
        for i in range(count):
            if graph[member, i] and codes[i] == UNCOVERED:
                codes[i] = num_members
                if peak > 1:
                    gone = graph[i]
                    for j in range(count):
                        degrees[j] -= gone[j]
                degrees[i] = -count - 1  # out of reach of any further subtraction
        members[num_members] = member
        num_members += 1
    return codes, members[:num_members]

"""Codebooks of one layer, fast: products by torch, the greedy choice compiled.

Shapes: K kv heads, N vectors per head, W vectors of a window, M of them still open, E entries so
far, D head size. Slow twin: ``core.codebook.windowed_cover``, whose results these are, but for
vectors so close to the threshold that the order of a float32 sum decides.

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

from vllm_spindle.core.codebook import UNCOVERED, Codebook

ROUND = 128
WINDOW = 1024  # the graph of a window, W * W bytes, stays in the cache
# Rounding of both factors (2 ** -9 each) and of the product (2 ** -9), and the sum's own.
BF16_MARGIN = 0.0065
BLOCK = 64  # products passed over at once
ANY = np.float32(-2)  # less than any cosine

# The reductions below are over finite numbers, so their order and NaN do not matter.
_compiled = partial(njit, cache=True, nogil=True, fastmath={"nnan", "nsz", "reassoc"})


def cover_layer(
    vectors: Tensor, threshold: float, capacity: int | None, window: int = WINDOW
) -> tuple[Codebook, ...]:
    """One codebook per kv head, as ``core.codebook.cover_heads`` with scope ``head``.

    Args:
        vectors: keys without rotation, or values. [K, N, D].
        threshold: 0 < threshold <= 1.
        capacity: most entries of a head, at least 1; None for as many as it takes.
        window: vectors per window.
    """
    return tuple(windowed_cover(head, threshold, capacity, window) for head in vectors)


def windowed_cover(
    vectors: Tensor, threshold: float, capacity: int | None, window: int = WINDOW
) -> Codebook:
    """The same as ``core.codebook.windowed_cover``. vectors: [N, D].

    Raises:
        ValueError: if an argument is out of range.
    """
    num_vectors, head_size = vectors.shape
    most = num_vectors if capacity is None else capacity
    if not 0 < threshold <= 1 or most < min(1, num_vectors) or window < 1:
        raise ValueError(
            "threshold must be in (0, 1], capacity and window at least 1, got "
            f"{threshold}, {capacity} and {window}"
        )
    vectors = vectors.float()
    norms = torch.linalg.vector_norm(vectors, dim=-1)
    directions = vectors / norms.clamp(min=torch.finfo(torch.float32).tiny)[:, None]
    codes = torch.where(norms > 0, UNCOVERED, 0)  # a zero vector needs no entry of its own
    book = _Book(directions, min(most, num_vectors), threshold)
    for start in range(0, num_vectors, window):
        part = torch.arange(start, min(start + window, num_vectors))
        share = -(-most * (start + len(part)) // num_vectors)
        book.add_window(codes, part, share)
    for part in torch.split(_open(codes), window):
        book.add_window(codes, part, most)
    if book.num_entries == 0 and num_vectors:
        book.append(torch.zeros(1, dtype=torch.int64))  # nothing but zero vectors
    left = _open(codes)
    for part in torch.split(left, window):
        codes[part] = book.nearest(part, ANY)
    entries = book.entries[: book.num_entries].clone()
    similarity = (directions * entries[codes]).sum(dim=-1).clamp_(max=1)
    similarity[norms == 0] = 1
    return Codebook(entries, codes, norms, similarity, len(left))


def _open(codes: Tensor) -> Tensor:
    return (codes == UNCOVERED).nonzero().squeeze(-1)


def _round_up(count: int) -> int:
    """To few different shapes: oneDNN compiles a product's code for each, a millisecond a time."""
    return -(-count // ROUND) * ROUND


def _products(left: Tensor, right: Tensor, num_left: int, num_right: int) -> np.ndarray:
    """Products of the first rows of both. [num_left, num_right], float32."""
    return (left @ right.T)[:num_left, :num_right].float().contiguous().numpy()


@lru_cache(maxsize=1)
def _product_dtype() -> torch.dtype:
    return torch.bfloat16 if torch.cpu._is_avx512_bf16_supported() else torch.float32


class _Book:
    """A growing table of entries. directions: [N, D], float32, of length 1 or 0."""

    def __init__(self, directions: Tensor, capacity: int, threshold: float) -> None:
        dtype = _product_dtype()
        self.directions = directions
        self.entries = torch.empty(capacity, directions.shape[1])
        self.num_entries = 0
        self._threshold = np.float32(threshold)
        self._rough = directions.to(dtype)
        self._rough_entries = torch.zeros(_round_up(capacity), directions.shape[1], dtype=dtype)
        self._margin = np.float32(BF16_MARGIN if dtype == torch.bfloat16 else 0)

    def add_window(self, codes: Tensor, part: Tensor, most: int) -> None:
        """Code the open vectors at the indices ``part``, with at most so many entries then."""
        part = part[codes[part] == UNCOVERED]
        if self.num_entries and len(part):
            codes[part] = nearest = self.nearest(part, self._threshold)
            part = part[nearest == UNCOVERED]
        if most <= self.num_entries or not len(part):
            return
        rough = self._rough_rows(part)
        own_codes, members = greedy_members(
            _products(rough, rough, len(part), len(part)),
            self.directions[part].numpy(),
            self._threshold,
            self._margin,
            most - self.num_entries,
        )
        own_codes = torch.from_numpy(own_codes)
        codes[part] = torch.where(own_codes == UNCOVERED, UNCOVERED, own_codes + self.num_entries)
        self.append(part[torch.from_numpy(members)])

    def append(self, members: Tensor) -> None:
        """Make the vectors at these indices entries."""
        stop = self.num_entries + len(members)
        self.entries[self.num_entries : stop] = self.directions[members]
        self._rough_entries[self.num_entries : stop] = self._rough[members]
        self.num_entries = stop

    def _rough_rows(self, part: Tensor) -> Tensor:
        """The vectors at these indices, and some more to fill up."""
        return self._rough[functional.pad(part, (0, _round_up(len(part)) - len(part)))]

    def nearest(self, part: Tensor, least: np.float32) -> Tensor:
        """Nearest entry with a cosine above ``least``, or UNCOVERED. [len(part)], int64."""
        entries = self._rough_entries[: _round_up(self.num_entries)]
        return torch.from_numpy(
            nearest_entries(
                _products(self._rough_rows(part), entries, len(part), self.num_entries),
                self.directions[part].numpy(),
                self.entries.numpy(),
                least,
                self._margin,
            )
        )


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

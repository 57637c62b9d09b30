"""Merge similar vectors: a few entries, and for every vector an index and a norm.

Shapes: N vectors, E entries, D head size, K kv heads, G query heads per kv head, T tokens.
Method: SpindleKV sec. 3.3, eq. 8-14, Algorithm 1 (arXiv:2507.06517). Differs from the paper:
degrees come from the graph (eq. 10; Algorithm 1 prints the similarities, which never change), and
entries have a capacity, because the engine counts bytes before it sees data (``admission.py``). A
covered vector is within ``sqrt(2 (1 - threshold))`` of its length from its reconstruction: 0.20 at
0.98, 0.32 at 0.95.
"""

import math
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from vllm_spindle.core.cover import UNCOVERED, cover_greedily, nearest_entry

ScopeName = Literal["head", "kv-group", "layer"]


@dataclass(frozen=True, slots=True)
class Codebook:
    """Vectors as entry times norm.

    Attributes:
        entries: normalised members of the vectors they stand for, first chosen first. [E, D],
            float32.
        codes: each vector's entry. [N], int64.
        norms: each vector's length. [N], float32.
        similarity: cosine of each vector to its entry; 1 for a zero vector. [N], float32.
    """

    entries: Tensor
    codes: Tensor
    norms: Tensor
    similarity: Tensor


def reconstruct(codebook: Codebook) -> Tensor:
    """The vectors as the codebook remembers them (eq. 14). [N, D], float32."""
    return codebook.entries[codebook.codes].float() * codebook.norms.float().unsqueeze(-1)


class Book:
    """A codebook that grows: vectors come in parts, and each part is matched, then covered.

    The compiled twin is ``kernels/cover.py``.

    Attributes:
        directions: the vectors, of length 1 or 0. [N, D], float32.
        norms: [N], float32.
        codes: each vector's entry, or UNCOVERED. [N], int64.
        num_entries: so far.
    """

    def __init__(self, vectors: Tensor, threshold: float, capacity: int | None = None) -> None:
        """An empty table.

        Args:
            vectors: keys without rotation, or values. [N, D].
            threshold: 0 < threshold <= 1; at 1 nothing is merged.
            capacity: most entries, at least 1; None for as many as it takes.

        Raises:
            ValueError: if an argument is out of range.
        """
        if not 0 < threshold <= 1:
            raise ValueError(f"threshold must be in (0, 1], got {threshold}")
        if capacity is not None and capacity < 1:
            raise ValueError(f"capacity must be at least 1, got {capacity}")
        vectors = vectors.float()
        self.norms = torch.linalg.vector_norm(vectors, dim=-1)
        tiny = torch.finfo(torch.float32).tiny
        self.directions = vectors / self.norms.clamp(min=tiny)[:, None]
        # A zero vector is any entry times 0: it needs none of its own.
        self.codes = torch.where(self.norms > 0, UNCOVERED, 0)
        self.num_entries = 0
        self._threshold = threshold
        self._capacity = len(vectors) if capacity is None else min(capacity, len(vectors))
        self._table = torch.zeros_like(self.directions[: self._capacity])

    @property
    def has_room(self) -> bool:
        """Whether there may be another entry."""
        return self.num_entries < self._capacity

    @property
    def entries(self) -> Tensor:
        """[E, D]; a zero row where there are none but zero vectors."""
        return self._table[: max(self.num_entries, min(1, len(self._table)))]

    def add(self, part: Tensor) -> Tensor:
        """Code the vectors at these indices: the nearest entry above the threshold, or a new one.

        Those that match no entry are covered greedily, as far as there is room.

        Returns:
            The indices that have a code now.
        """
        todo = part[self.codes[part] == UNCOVERED]
        if self.num_entries and len(todo):
            self.codes[todo] = nearest = self._nearest(todo)
            todo = todo[nearest == UNCOVERED]
        room = self._capacity - self.num_entries
        if room and len(todo):
            codes, members = self._cover(todo, room)
            self.codes[todo] = torch.where(codes == UNCOVERED, codes, codes + self.num_entries)
            self._append(todo[members])
        return part[self.codes[part] != UNCOVERED]

    def codebook(self, coded: Tensor) -> Codebook:
        """What there is, for the vectors at these indices, which must have a code."""
        entries, codes, norms = self.entries.clone(), self.codes[coded], self.norms[coded]
        similarity = self._similarity(coded)
        similarity[norms == 0] = 1
        return Codebook(entries, codes, norms, similarity)

    def _similarity(self, coded: Tensor) -> Tensor:
        products = self.directions[coded] * self.entries[self.codes[coded]]
        return torch.clamp(products.sum(dim=-1), max=1)

    def _nearest(self, part: Tensor) -> Tensor:
        return nearest_entry(self.directions[part], self.entries, self._threshold)

    def _cover(self, part: Tensor, room: int) -> tuple[Tensor, Tensor]:
        return cover_greedily(self.directions[part], self._threshold, room)

    def _append(self, members: Tensor) -> None:
        stop = self.num_entries + len(members)
        self._table[self.num_entries : stop] = self.directions[members]
        self.num_entries = stop


def greedy_cover(vectors: Tensor, threshold: float) -> Codebook:
    """The paper's cover: the vector with the most uncovered neighbours becomes an entry, repeat.

    Neighbours are at a cosine above ``threshold``; ties go to the lowest index. The graph takes
    N * N bytes.

    Args:
        vectors: keys without rotation, or values. [N, D].
        threshold: 0 < threshold <= 1; at 1 nothing is merged.
    """
    return windowed_cover(vectors, threshold, window=max(1, len(vectors)))


def windowed_cover(
    vectors: Tensor, threshold: float, window: int, book: type[Book] = Book
) -> Codebook:
    """The cover in bounded time: window by window, each matched against the entries so far.

    With one window this is ``greedy_cover``.

    Args:
        vectors: [N, D].
        threshold: 0 < threshold <= 1.
        window: vectors per window, at least 1.
        book: who does it.
    """
    growing = book(vectors, threshold)
    everyone = torch.arange(len(vectors), device=vectors.device)
    for part in torch.split(everyone, window):
        growing.add(part)
    return growing.codebook(everyone)


def cover_heads(
    vectors: Tensor,
    scope: ScopeName,
    threshold: float,
    window: int | None = None,
    book: type[Book] = Book,
) -> tuple[Codebook, ...]:
    """One codebook per head, per kv head, or for the whole layer.

    The codes of several heads index their shared table. Heads follow one another, so that the
    tables' codes, one after the other, have the shape of ``vectors`` without D.

    Args:
        vectors: [K, T, D], or [K, G, T, D] with a copy per query head.
        scope: whose vectors share a table; ``kv-group`` is a kv head and its copies.
        threshold: see ``greedy_cover``.
        window: tokens per window, of all heads that share a table; None for no windows.
        book: see ``windowed_cover``.
    """
    *heads, num_tokens, head_size = vectors.shape
    num_tables = {"head": math.prod(heads), "kv-group": heads[0], "layer": 1}.get(scope)
    if num_tables is None:
        raise ValueError(f"scope must be head, kv-group or layer, got {scope!r}")
    num_heads = math.prod(heads) // num_tables  # that share a table
    tables = vectors.reshape(num_tables, num_heads, num_tokens, head_size)
    # Token by token, as a prompt comes in: a window then holds all heads of its tokens.
    codebooks = [
        windowed_cover(
            table.transpose(0, 1).reshape(-1, head_size),
            threshold,
            max(1, num_heads * (num_tokens if window is None else window)),
            book,
        )
        for table in tables
    ]
    return tuple(_by_head(codebook, num_heads) for codebook in codebooks)


def _by_head(codebook: Codebook, num_heads: int) -> Codebook:
    """From token by token to head by head."""
    by_head = {
        name: getattr(codebook, name).view(-1, num_heads).T.flatten()
        for name in ("codes", "norms", "similarity")
    }
    return replace(codebook, **by_head)

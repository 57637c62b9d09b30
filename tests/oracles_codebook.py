"""Slow, obvious twins of the codebook and of rotary: plain loops, written from the definitions.

Shapes: N vectors, E entries, D head size, H query heads, K kv heads, G query heads per kv head,
Q queries, T tokens of the tail. Nothing here imports the code under test.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def cosine(a: Sequence[float], b: Sequence[float]) -> float:
    """Of two vectors that are not zero."""
    dot = sum(x * y for x, y in zip(a, b, strict=True))
    return dot / (math.hypot(*a) * math.hypot(*b))


class Cover:
    """A table that grows by plain loops. A vector is always similar to itself. No zero vectors."""

    def __init__(self, vectors: Tensor, threshold: float, capacity: int | None = None) -> None:
        rows = vectors.double().tolist()
        self._similarity = [
            [2.0 if a == b else cosine(rows[a], rows[b]) for b in range(len(rows))]
            for a in range(len(rows))
        ]
        self._threshold = threshold
        self._capacity = len(rows) if capacity is None else capacity
        self.members: list[int] = []
        self.codes: list[int | None] = [None] * len(rows)

    def add(self, part: Sequence[int]) -> list[int]:
        """Match with what is there, then Algorithm 1 as it was meant. Who has a code then."""
        for vector in part:
            near = [
                code
                for code, member in enumerate(self.members)
                if self._similarity[vector][member] > self._threshold
            ]
            if self.codes[vector] is None and near:
                own = self._similarity[vector]
                self.codes[vector] = max(near, key=lambda code: own[self.members[code]])
        while len(self.members) < self._capacity:
            left = [v for v in part if self.codes[v] is None]
            if not left:
                break
            neighbours = {
                v: [w for w in left if self._similarity[v][w] > self._threshold] for v in left
            }
            best = max(left, key=lambda v: len(neighbours[v]))
            for vector in neighbours[best]:
                self.codes[vector] = len(self.members)
            self.members.append(best)
        return [vector for vector in part if self.codes[vector] is not None]


def cover(vectors: Tensor, threshold: float, window: int) -> Cover:
    """All vectors, window by window."""
    table = Cover(vectors, threshold)
    for start in range(0, len(vectors), window):
        table.add(range(start, min(start + window, len(vectors))))
    return table


def admitted(
    keys: Tensor,
    values: Tensor,
    ranked: Sequence[int],
    thresholds: tuple[float, float],
    capacity: tuple[int, int, int],
    chunk: int,
) -> tuple[list[int], Cover, Cover]:
    """Tokens that find a place by rank, ascending, and the tables; ``ranked`` are all of them."""
    key_table = Cover(keys, thresholds[0], capacity[0])
    value_table = Cover(values, thresholds[1], capacity[1])
    tokens: list[int] = []
    left = list(ranked)
    while left and len(tokens) < capacity[2]:
        # Full of keys, the rest is matched at once: those that fit are then covered by value.
        size = chunk if len(key_table.members) < min(capacity[0], len(ranked)) else len(left)
        fitting, left = key_table.add(left[:size]), left[size:]
        for start in range(0, len(fitting), chunk):
            both = value_table.add(fitting[start : start + chunk])
            tokens += both[: capacity[2] - len(tokens)]
    return sorted(tokens), key_table, value_table


def cos_sin_table(num_positions: int, head_size: int, base: float = 10_000.0) -> Tensor:
    """Cosines, then sines, of position times speed. [P, D]."""
    half = head_size // 2
    speeds = [base ** (-i / half) for i in range(half)]
    return torch.tensor(
        [
            [math.cos(position * speed) for speed in speeds]
            + [math.sin(position * speed) for speed in speeds]
            for position in range(num_positions)
        ]
    )


def rotate(vector: Tensor, position: int, base: float = 10_000.0) -> Tensor:
    """One key, as complex numbers: element i is real, element i + D/2 imaginary. [D]."""
    numbers, half = vector.tolist(), len(vector) // 2
    turned = [
        complex(numbers[i], numbers[i + half])
        * complex(
            math.cos(position * base ** (-i / half)), math.sin(position * base ** (-i / half))
        )
        for i in range(half)
    ]
    return torch.tensor([z.real for z in turned] + [z.imag for z in turned])


def attention(query: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
    """One query over some tokens. query [D], keys and values [T, D]."""
    logits = [scale * float(query @ key) for key in keys]
    powers = [math.exp(logit - max(logits)) for logit in logits]
    return sum(p / sum(powers) * v for p, v in zip(powers, values, strict=True))

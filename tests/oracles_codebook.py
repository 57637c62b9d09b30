"""Slow, obvious twins of the codebook and of rotary: plain loops, written from the definitions.

Shapes: N vectors, E entries, D head size, H query heads, K kv heads, G query heads per kv head,
Q queries, T tokens of the tail. Nothing here imports the code under test.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Cover:
    """Chosen members in order, each vector's entry, and who found none above the threshold."""

    members: list[int]
    codes: list[int]
    num_overflow: int


def cosine(a: Sequence[float], b: Sequence[float]) -> float:
    """Of two vectors that are not zero."""
    dot = sum(x * y for x, y in zip(a, b, strict=True))
    return dot / (math.hypot(*a) * math.hypot(*b))


def cover(vectors: Tensor, threshold: float, capacity: int | None, window: int) -> Cover:
    """Window by window: match with what is there, then Algorithm 1 as it was meant.

    Twice: with an even share of the capacity, then whoever is left with all of it.
    A vector is always similar to itself. No zero vectors.
    """
    rows = vectors.double().tolist()
    similarity = [
        [2.0 if a == b else cosine(rows[a], rows[b]) for b in range(len(rows))]
        for a in range(len(rows))
    ]
    members: list[int] = []
    codes: list[int | None] = [None] * len(rows)

    def match(vector: int, above: float) -> None:
        near = [code for code, m in enumerate(members) if similarity[vector][m] > above]
        if codes[vector] is None and near:
            codes[vector] = max(near, key=lambda code: similarity[vector][members[code]])

    def add(part: list[int], limit: int) -> None:
        for vector in part:
            match(vector, threshold)
        while len(members) < limit:
            left = [v for v in part if codes[v] is None]
            if not left:
                break
            neighbours = {v: [w for w in left if similarity[v][w] > threshold] for v in left}
            best = max(left, key=lambda v: len(neighbours[v]))
            for vector in neighbours[best]:
                codes[vector] = len(members)
            members.append(best)

    total = len(rows) if capacity is None else capacity
    for start in range(0, len(rows), window):
        stop = min(start + window, len(rows))
        # An even share of the capacity, up to the end of this window.
        add(list(range(start, stop)), math.ceil(total * stop / len(rows)))
    open_ = [v for v in range(len(rows)) if codes[v] is None]
    for start in range(0, len(open_), window):
        add(open_[start : start + window], total)
    num_overflow = codes.count(None)
    for vector in range(len(rows)):
        match(vector, -2.0)
    return Cover(members, [code for code in codes if code is not None], num_overflow)


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

"""Slow, obvious twins of the baselines: plain loops over nested lists, from the definitions.

Shapes: K kv heads, G query heads per kv head, T tokens, C context tokens, D head size. Nothing here
imports the code under test.
"""

import cmath
import math
from collections.abc import Sequence

from torch import Tensor

Matrix = list[list[float]]


def attention(queries: Tensor, keys: Tensor, scale: float) -> list[list[list[Matrix]]]:
    """Causal attention of every query. [K][G][T][T], query by key."""
    out = []
    for own, own_keys in zip(queries.tolist(), keys.tolist(), strict=True):
        out.append([[_row(query, own_keys[: b + 1], scale, len(own_keys))
                     for b, query in enumerate(head)] for head in own])  # fmt: skip
    return out


def _row(query: list[float], keys: Matrix, scale: float, width: int) -> list[float]:
    powers = [math.exp(scale * dot(query, key)) for key in keys]
    return [power / sum(powers) for power in powers] + [0.0] * (width - len(keys))


def dot(left: Sequence[float], right: Sequence[float]) -> float:
    """Inner product."""
    return sum(a * b for a, b in zip(left, right, strict=True))


def cosine(left: Sequence[float], right: Sequence[float]) -> float:
    """Of the angle between."""
    return dot(left, right) / math.sqrt(dot(left, left) * dot(right, right))


def mean(values: Sequence[float]) -> float:
    """Arithmetic."""
    return sum(values) / len(values)


def column_sums(heads: list[list[Matrix]]) -> list[Matrix]:
    """Attention that each token receives, all queries. [K][G][T]."""
    return [[[sum(column) for column in zip(*head, strict=True)] for head in own] for own in heads]


def group_mean(scores: list[Matrix]) -> Matrix:
    """Mean over query heads. [K][T]."""
    return [[mean(column) for column in zip(*own, strict=True)] for own in scores]


def top(scores: Sequence[float], num_kept: int) -> list[int]:
    """Positions of the highest scores, ascending; the earlier of equals."""
    return sorted(sorted(range(len(scores)), key=lambda t: (-scores[t], t))[:num_kept])


def snapkv(heads: list[list[Matrix]], window: int, kernel: int, pool: str) -> Matrix:
    """SnapKV's scores of the context, mean over the group. [K][C]."""
    pooled = []
    for own in heads:
        rows = []
        for head in own:
            context = len(head) - window
            sums = [sum(row[t] for row in head[-window:]) for t in range(context)]
            half = kernel // 2
            near = [
                [sums[n] if 0 <= n < context else None for n in range(t - half, t + half + 1)]
                for t in range(context)
            ]
            if pool == "max":
                rows.append([max(n for n in each if n is not None) for each in near])
            else:
                rows.append([sum(n or 0.0 for n in each) / kernel for each in near])
        pooled.append(rows)
    return group_mean(pooled)


def adakv_counts(scores: Matrix, total: int, floor: float) -> list[float]:
    """What each head is due, before rounding."""
    pairs = sorted(
        ((score, head) for head, row in enumerate(scores) for score in row), reverse=True
    )
    counts = [sum(head == h for _, head in pairs[:total]) for h in range(len(scores))]
    return [(1 - floor) * count + floor * total / len(scores) for count in counts]


def pyramidkv_budgets(num_layers: int, total: float, num_tokens: int, window: int, beta: int):
    """Tokens per layer, window included, before rounding."""
    c = total / num_layers - window
    if num_tokens < 2 * c:
        return [total / num_layers] * num_layers
    low, high = c / beta, 2 * c - c / beta
    if high > num_tokens - window:
        high = num_tokens - window
        low = 2 * c - high
    return [window + high - (high - low) * i / (num_layers - 1) for i in range(num_layers)]


def pyramidinfer_scores(heads: list[list[Matrix]], ratio: float, newest: float) -> list[float]:
    """Weighted mean of the last rows, all heads. [T]."""
    num_tokens = len(heads[0][0])
    num_rows = 1 + int(ratio * num_tokens)
    rows = range(num_tokens - num_rows, num_tokens)
    weights = [1 + (newest - 1) * i / max(1, num_rows - 1) for i in range(num_rows)]
    everyone = [head for own in heads for head in own]
    return [
        sum(w * mean([head[b][t] for head in everyone]) for w, b in zip(weights, rows, strict=True))
        / sum(weights)
        for t in range(num_tokens)
    ]


def pyramidinfer_shares(floor: float, num_layers: int) -> list[float]:
    """Share of the prompt that each layer keeps."""
    steps = [
        (1 - floor) * (math.cos(math.pi * i / num_layers) + 1) / 2 + floor
        for i in range(num_layers)
    ]
    return [math.prod(steps[: i + 1]) for i in range(num_layers)]


def turn(vector: Sequence[float], angles: Sequence[float], sign: int = 1) -> list[float]:
    """Element i with i + D/2, as one complex number, turned by its angle."""
    half = len(vector) // 2
    turned = [
        complex(vector[i], vector[i + half]) * cmath.exp(sign * 1j * angles[i]) for i in range(half)
    ]
    return [z.real for z in turned] + [z.imag for z in turned]


def expected_attention(
    queries: Tensor, keys: Tensor, values: Tensor, angles: Matrix, scale: float, skip: int
) -> Matrix:
    """Expected Attention's scores, sinks not yet raised. angles: [T + future][D / 2]. [K][T]."""
    num_tokens = keys.shape[1]
    future = angles[num_tokens:]
    scores = []
    for own, own_keys, own_values in zip(
        queries.tolist(), keys.tolist(), values.tolist(), strict=True
    ):
        heads = []
        for head in own:
            plain = [turn(q, angles[t], -1) for t, q in enumerate(head)][skip:]
            size = len(plain[0])
            middle = [mean([q[i] for q in plain]) for i in range(size)]
            # E[exp] of a Gaussian: mean and covariance of R q, R the mean of the future's turns.
            turned = [[mean(column) for column in zip(*(turn(q, a) for a in future), strict=True)]
                      for q in plain]  # fmt: skip
            moved = [
                mean(column) for column in zip(*(turn(middle, a) for a in future), strict=True)
            ]
            logits = []
            for key in own_keys:
                variance = mean(
                    [dot(key, [a - b for a, b in zip(q, moved, strict=True)]) ** 2 for q in turned]
                )
                logits.append(scale * dot(key, moved) + scale**2 * variance / 2)
            powers = [math.exp(z) for z in logits]
            heads.append([power / sum(powers) for power in powers])
        lengths = [math.sqrt(dot(value, value)) for value in own_values]
        expected = [mean(column) for column in zip(*heads, strict=True)]
        scores.append([e * length for e, length in zip(expected, lengths, strict=True)])
    return scores


def d2o_layer_weights(layers: Sequence[list[Matrix]], total: int, num_tokens: int) -> list[float]:
    """Share of the prompt per layer. layers: column sums, [L] of [K][G][T]."""
    spreads = []
    for sums in layers:
        heads = []
        for head in (head for own in sums for head in own):
            low, high = min(head), max(head)
            scaled = [(s - low) / (high - low) for s in head]
            heads.append(mean([(s - mean(scaled)) ** 2 for s in scaled]))
        spreads.append(mean(heads))
    powers = [math.exp(-v) for v in spreads]
    return [min(1.0, max(0.01, p / sum(powers) * total / num_tokens)) for p in powers]


def d2o_fold(
    keys: Matrix, values: Matrix, kept: Sequence[int], num_context: int
) -> tuple[Matrix, Matrix]:
    """One kv head's kept context keys and values after the evicted have merged into them."""
    evicted = [t for t in range(num_context) if t not in kept]
    nearest = {t: max(kept, key=lambda k: cosine(keys[t], keys[k])) for t in evicted}
    near = {t: cosine(keys[t], keys[nearest[t]]) for t in evicted}
    threshold = mean(list(near.values()))
    out: tuple[Matrix, Matrix] = ([], [])
    for k in kept:
        joined = [(1.0, k)] + [
            (near[t], t) for t in evicted if nearest[t] == k and near[t] >= threshold
        ]
        total = sum(weight for weight, _ in joined)
        for side, rows in zip(out, (keys, values), strict=True):
            side.append(
                [sum(w * rows[t][d] for w, t in joined) / total for d in range(len(rows[0]))]
            )
    return out

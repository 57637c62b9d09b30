"""Slow, obvious twins of the core: plain loops and searches, written from the definitions.

Shapes: K kv heads, G query heads per kv head, H = K * G query heads, W window queries, Q queries,
T tokens, C context tokens, N kept tokens, D head size. Nothing here imports the code under test.
"""

import itertools
import math
from collections.abc import Sequence
from fractions import Fraction

import torch
from torch import Tensor


def window_attention(queries: Tensor, keys: Tensor, scale: float) -> Tensor:
    """One softmax per window query over the tokens up to its own, added up. [K, G, T]."""
    num_kv_heads, group, window, head_size = queries.shape
    num_tokens = keys.shape[1]
    total = torch.zeros(num_kv_heads, group, num_tokens)
    for k, g, w in itertools.product(range(num_kv_heads), range(group), range(window)):
        position = num_tokens - window + w
        powers = []
        for t in range(position + 1):
            dot = sum(float(queries[k, g, w, d] * keys[k, t, d]) for d in range(head_size))
            powers.append(math.exp(scale * dot))
        for t, power in enumerate(powers):
            total[k, g, t] += power / sum(powers)
    return total


def pooled_importance(attention: Tensor, num_context: int, pool_kernel: int) -> Tensor:
    """The largest attention among the context tokens at most half a kernel away. [K, G, C]."""
    out = torch.empty(*attention.shape[:2], num_context)
    for c in range(num_context):
        near = [n for n in range(num_context) if abs(n - c) <= pool_kernel // 2]
        for k, g in itertools.product(range(attention.shape[0]), range(attention.shape[1])):
            out[k, g, c] = max(float(attention[k, g, n]) for n in near)
    return out


def paper_importance(attention: Tensor, num_context: int) -> Tensor:
    """Each context token's attention over its distance from the end, l - a. [K, G, C]."""
    out = torch.empty(*attention.shape[:2], num_context)
    for c in range(num_context):
        for k, g in itertools.product(range(attention.shape[0]), range(attention.shape[1])):
            out[k, g, c] = float(attention[k, g, c]) / (attention.shape[2] - c)
    return out


def ranking(scores: Sequence[float]) -> list[int]:
    """Positions from the best score to the worst."""
    return sorted(range(len(scores)), key=lambda position: -scores[position])


def top(scores: Sequence[float], num_kept: int) -> list[int]:
    """The best positions, ascending."""
    return sorted(ranking(scores)[:num_kept])


def union_by_rank(scores: Tensor, num_kept: int) -> list[list[int]]:
    """Heads take turns to name their next best token until N are in. [K][N], ascending."""
    kept = []
    for group_scores in scores.tolist():
        rankings = [ranking(head) for head in group_scores]
        chosen: list[int] = []
        for rank in range(scores.shape[2]):
            for head in rankings:
                if len(chosen) < num_kept and head[rank] not in chosen:
                    chosen.append(head[rank])
        kept.append(sorted(chosen))
    return kept


def mean_over_group(scores: Tensor, num_kept: int) -> list[list[int]]:
    """The best tokens by the group's average score. [K][N], ascending."""
    return [
        top([sum(column) / len(column) for column in zip(*group_scores, strict=True)], num_kept)
        for group_scores in scores.tolist()
    ]


def unfold(scores: Tensor, num_kept: int) -> list[list[list[int]]]:
    """The best tokens of every query head by itself. [K][G][N], ascending."""
    return [[top(head, num_kept) for head in group_scores] for group_scores in scores.tolist()]


def masked_attention(
    queries: Tensor, keys: Tensor, values: Tensor, visible: Tensor, scale: float
) -> Tensor:
    """Full softmax under a mask: hidden logits are minus infinity. [Q, H, D].

    Args:
        queries: [Q, H, D].
        keys: [T, K, D].
        values: [T, K, D].
        visible: True where a query of a head sees a token. [Q, H, T].
        scale: softmax scale.
    """
    group = queries.shape[1] // keys.shape[1]
    keys = keys.repeat_interleave(group, dim=1)
    values = values.repeat_interleave(group, dim=1)
    logits = torch.einsum("qhd,thd->qht", queries, keys) * scale
    weights = torch.softmax(logits.masked_fill(~visible, float("-inf")), dim=-1)
    return torch.einsum("qht,thd->qhd", weights, values)


def causal_mask(num_queries: int, num_heads: int, num_tokens: int) -> Tensor:
    """The last Q of T tokens see themselves and what came before. [Q, H, T]."""
    positions = torch.arange(num_tokens - num_queries, num_tokens)
    causal = torch.arange(num_tokens) <= positions[:, None]
    return causal[:, None].expand(-1, num_heads, -1).clone()


def kept_mask(kept: Tensor, num_queries: int, num_tokens: int, num_context: int) -> Tensor:
    """The causal mask with context tokens hidden from the heads that did not keep them.

    Args:
        kept: positions per query head. [K, G, N].
    """
    num_kv_heads, group, _ = kept.shape
    visible = causal_mask(num_queries, num_kv_heads * group, num_tokens)
    for k, g, token in itertools.product(range(num_kv_heads), range(group), range(num_context)):
        if token not in kept[k, g].tolist():
            visible[:, k * group + g, token] = False
    return visible


def nearest_shares(
    quotas: Sequence[Fraction], total: int, floor: int, cap: int
) -> list[tuple[int, ...]]:
    """Every way to share ``total`` within the bounds whose squared distance is least."""
    every = [
        shares
        for shares in itertools.product(range(floor, cap + 1), repeat=len(quotas))
        if sum(shares) == total
    ]
    distances = [sum((s - q) ** 2 for s, q in zip(shares, quotas, strict=True)) for shares in every]
    return [s for s, d in zip(every, distances, strict=True) if d == min(distances)]


def cache_bytes(held_blocks: Sequence[int], block_size: int, band_layers: Sequence[int]) -> int:
    """What the blocks cost, in tokens times layers: every group is as long as the longest."""
    return sum(held_blocks) * block_size * max(band_layers)


def most_region_units(
    prompt_len: int,
    keep_ratio: Fraction,
    tail_block: int,
    block_size: int,
    band_layers: Sequence[int],
    unit_blocks: int,
) -> int:
    """Units of the reduced region, over all bands, found by adding one while it still fits."""
    allowed = keep_ratio * prompt_len * sum(band_layers)
    prompt_blocks = math.ceil(Fraction(prompt_len, block_size))
    room = len(band_layers) * (tail_block // unit_blocks)
    window_blocks = (prompt_blocks - tail_block) * len(band_layers)
    units = 0
    while units < room:
        blocks = window_blocks + (units + 1) * unit_blocks
        if cache_bytes([blocks], block_size, band_layers) > allowed:
            break
        units += 1
    return units


def pyramid(num_layers: int, context_ratio: float, beta: float) -> list[float]:
    """Eq. 4-6 with the sign of the second branch corrected, in floats."""
    if context_ratio <= beta:
        return [context_ratio] * num_layers
    if context_ratio <= (1 + beta) / 2:
        first, last = 2 * context_ratio - beta, beta
    else:
        first, last = 1.0, 2 * context_ratio - 1
    return [first + (last - first) * i / (num_layers - 1) for i in range(num_layers)]

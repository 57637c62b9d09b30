"""Attention over a reduced cache, slow and obvious: the oracle of every kernel and of the engine.

Shapes: K kv heads, G query heads per kv head, H = K * G query heads, Q queries, P prompt tokens,
N kept context tokens, T tokens whose keys are given, D head size.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from vllm_spindle.core.codebook import Codebook, reconstruct
from vllm_spindle.core.rotary import rotate_keys


def attend_reduced(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    kept: Tensor,
    *,
    num_context: int,
    scale: float,
) -> Tensor:
    """Outputs of queries that come after the reduction of a prompt.

    Every query head sees the context tokens kept for it and all tokens from ``num_context``
    on, up to its own position. Keys are rotated at their original positions, so nothing depends
    on where a kept token is stored.

    Args:
        queries: rotated queries of the last Q of T tokens. [Q, H, D].
        keys: rotated keys of all T tokens, prompt and generated. [T, K, D].
        values: [T, K, D].
        kept: kept context positions, [K, N] shared by a group's query heads, or [K, G, N].
        num_context: positions below this are context: only the kept ones are seen.
        scale: softmax scale.

    Returns:
        [Q, H, D], float32.
    """
    num_queries, num_heads, _ = queries.shape
    num_tokens, num_kv_heads, _ = keys.shape
    group = num_heads // num_kv_heads
    per_head = kept if kept.dim() == 3 else kept.unsqueeze(1).expand(-1, group, -1)
    outputs = torch.empty(queries.shape, dtype=torch.float32)
    for head in range(num_heads):
        kv_head = head // group
        visible = torch.zeros(num_tokens, dtype=torch.bool)
        visible[per_head[kv_head, head % group]] = True
        visible[num_context:] = True
        for row in range(num_queries):
            position = num_tokens - num_queries + row
            seen = visible.clone()
            seen[position + 1 :] = False
            logits = keys[seen, kv_head].float() @ queries[row, head].float() * scale
            outputs[row, head] = torch.softmax(logits, dim=0) @ values[seen, kv_head].float()
    return outputs


def attend_codebook(
    queries: Tensor,
    key_codebooks: Sequence[Codebook],
    value_codebooks: Sequence[Codebook],
    positions: Sequence[Tensor],
    tail_keys: Tensor,
    tail_values: Tensor,
    cos_sin: Tensor,
    *,
    scale: float,
) -> Tensor:
    """Outputs of queries over merged context tokens and the dense tokens after them.

    Every query sees all merged tokens, and the tail up to its own position. Each reconstructed
    key is rotated at its token's own position.

    Args:
        queries: rotated queries of the last Q tokens of the tail. [Q, H, D].
        key_codebooks: of un-rotated keys; their codes, one table after the other, are the merged
            tokens head by head, as ``cover_heads`` gives them.
        value_codebooks: the same for values; their scope may differ.
        positions: of each kv head's merged tokens: K times [n] shared by a group's query heads,
            or K times [G, n]. A tensor [K, N] or [K, G, N] will do.
        tail_keys: rotated keys of the dense tokens. [T, K, D].
        tail_values: [T, K, D].
        cos_sin: see ``rotate_keys``. [P, D].
        scale: softmax scale.

    Returns:
        [Q, H, D], float32.
    """
    num_queries, num_heads, head_size = queries.shape
    num_tail, num_kv_heads, _ = tail_keys.shape
    group = num_heads // num_kv_heads
    sizes = [own.numel() for own in positions]
    flat_keys = torch.split(torch.cat([reconstruct(c) for c in key_codebooks]), sizes)
    flat_values = torch.split(torch.cat([reconstruct(c) for c in value_codebooks]), sizes)
    outputs = torch.empty(queries.shape, dtype=torch.float32)
    for head in range(num_heads):
        kv_head = head // group
        places = positions[kv_head]
        merged_keys = rotate_keys(
            flat_keys[kv_head].view(*places.shape, head_size), places, cos_sin
        )
        merged_values = flat_values[kv_head].view(*places.shape, head_size)
        if places.dim() == 2:
            merged_keys, merged_values = merged_keys[head % group], merged_values[head % group]
        for row in range(num_queries):
            seen = num_tail - num_queries + row + 1
            keys = torch.cat([merged_keys, tail_keys[:seen, kv_head].float()])
            values = torch.cat([merged_values, tail_values[:seen, kv_head].float()])
            weights = torch.softmax(keys @ queries[row, head].float() * scale, dim=0)
            outputs[row, head] = weights @ values
    return outputs

"""Attention over a reduced cache, slow and obvious: the oracle of every kernel and of the engine.

Shapes: K kv heads, G query heads per kv head, H = K * G query heads, Q queries, P prompt tokens,
N kept context tokens, D head size.
"""

import torch
from torch import Tensor


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

"""Attention over a reduced context, all query heads at once; ``core/reference.py`` is its oracle.

Shapes: K kv heads, G query heads per kv head, Q queries, C context tokens that are left, T dense
tokens after them, D head size.
"""

import torch
from torch import Tensor


def attend(
    queries: Tensor,
    context_keys: Tensor,
    context_values: Tensor,
    is_there: Tensor,
    tail_keys: Tensor,
    tail_values: Tensor,
    scale: float,
) -> Tensor:
    """Outputs of the last Q of the T dense tokens: all of the context, the tail causally.

    Args:
        queries: rotated. [K, G, Q, D].
        context_keys: rotated. [K, C, D].
        context_values: [K, C, D].
        is_there: False where a kv head has fewer context tokens. [K, C], bool.
        tail_keys: rotated. [K, T, D].
        tail_values: [K, T, D].
        scale: softmax scale.

    Returns:
        [K, G, Q, D], float32.
    """
    num_queries, num_context, num_tail = queries.shape[2], context_keys.shape[1], tail_keys.shape[1]
    keys = torch.cat([context_keys.float(), tail_keys.float()], dim=1).unsqueeze(1)
    values = torch.cat([context_values.float(), tail_values.float()], dim=1).unsqueeze(1)
    logits = (queries.float() * scale) @ keys.transpose(-1, -2)  # [K, G, Q, C + T]
    future = torch.ones(num_queries, num_tail, dtype=torch.bool).triu(num_tail - num_queries + 1)
    logits[..., num_context:].masked_fill_(future, float("-inf"))
    logits[..., :num_context].masked_fill_(~is_there[:, None, None], float("-inf"))
    return torch.softmax(logits, dim=-1) @ values

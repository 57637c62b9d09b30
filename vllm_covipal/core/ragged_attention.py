"""Attention over several items laid end to end, no item seeing another.

Shapes: Q query rows and K key rows of all items, H heads, S head size. xformers' block-diagonal
kernel where it runs (CUDA), PyTorch's attention item by item elsewhere: twins.
"""

from collections.abc import Sequence
from functools import lru_cache
from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


class RaggedAttention:
    """Which keys belong to which queries: item i's own."""

    def __init__(self, num_queries: Sequence[int], num_keys: Sequence[int]) -> None:
        """Args: num_queries, num_keys: rows of each item, at least one key where any query."""
        self.num_queries = list(num_queries)
        self.num_keys = list(num_keys)
        self._mask: Any = None

    def __call__(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Softmax attention within each item, scale S ** -0.5.

        Args:
            query: [Q, H, S].
            key: [K, H, S].
            value: [K, H, S].

        Returns:
            [Q, H, S].
        """
        ops = _xformers_ops() if query.is_cuda else None
        if ops is None:
            return self.item_by_item(query, key, value)
        if self._mask is None:
            self._mask = ops.fmha.attn_bias.BlockDiagonalMask.from_seqlens(
                self.num_queries, self.num_keys, device=query.device
            )
        batched = (query.unsqueeze(0), key.unsqueeze(0), value.unsqueeze(0))
        mixed: Tensor = ops.memory_efficient_attention(*batched, attn_bias=self._mask)
        return mixed.squeeze(0)

    def item_by_item(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """The same through ``scaled_dot_product_attention``, one call an item."""
        # [Q, H, S] -> [1, H, Q, S]: with a batch dimension the CPU's fused kernel serves.
        queries = torch.split(query.transpose(0, 1).unsqueeze(0), self.num_queries, dim=2)
        keys = torch.split(key.transpose(0, 1).unsqueeze(0), self.num_keys, dim=2)
        values = torch.split(value.transpose(0, 1).unsqueeze(0), self.num_keys, dim=2)
        mixed = [
            F.scaled_dot_product_attention(q, k, v)
            for q, k, v in zip(queries, keys, values, strict=True)
        ]
        return torch.cat(mixed, dim=2).squeeze(0).transpose(0, 1)


@lru_cache(maxsize=1)
def _xformers_ops() -> Any:
    """``xformers.ops``, or None where it is not installed."""
    try:
        return import_module("xformers.ops")
    except ImportError:
        return None

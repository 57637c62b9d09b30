"""vLLM's FlashAttention backend on a CPU: its classes as on Hopper, torch in place of the kernels.

Only the kernels are stand-ins, as they run on a GPU alone: ``flash_attn_varlen_func``,
``get_scheduler_metadata`` and ``reshape_and_cache_flash``. They ask of their tensors what
FlashAttention 3 asks (``hopper/flash_api_stable.cpp`` of vllm-project/flash-attention): types,
shapes, contiguous axes, strides that its bulk copies could use; and a plan of the very lengths
that they are called with.

Shapes: B rows, Q query tokens of all rows, P pages, n tokens per page, K kv heads, H query heads,
D head size.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

SPLIT_ROWS = 992  # with more, FlashAttention 3 splits no row
ALIGNED_BYTES = 16  # of strides


@contextmanager
def flash_attention() -> Iterator[None]:
    """Engines made inside attend by FlashAttention 3's backend; in float32, which it never is."""
    from vllm.platforms.cpu import CpuPlatform
    from vllm.v1.attention import selector
    from vllm.v1.attention.backend import AttentionCGSupport
    from vllm.v1.attention.backends import flash_attn
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    from vllm_spindle.engine import platforms

    def choose(*args: Any, **kwargs: Any) -> str:
        return AttentionBackendEnum.FLASH_ATTN.get_path()

    selector._cached_get_attn_backend.cache_clear()
    with ExitStack() as stack:
        for owner, name, value in (
            (CpuPlatform, "get_attn_backend_cls", choose),
            (torch.cuda, "get_device_capability", lambda *_: (9, 0)),
            (platforms, "CPU", replace(platforms.CPU, backends=platforms.CUDA.backends)),
            (flash_attn, "get_flash_attn_version", lambda *_, **__: 3),
            (flash_attn, "flash_attn_supports_quant_query_input", lambda: True),
            (flash_attn, "flash_attn_varlen_func", varlen),
            (flash_attn, "get_scheduler_metadata", plan),
            (flash_attn, "reshape_and_cache_flash", write),
            # Asked of the version when vLLM was imported.
            (
                flash_attn.FlashAttentionMetadataBuilder,
                "_cudagraph_support",
                AttentionCGSupport.ALWAYS,
            ),
        ):
            stack.enter_context(patch.object(owner, name, value, create=True))
        yield
    selector._cached_get_attn_backend.cache_clear()


def varlen(
    *,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    cu_seqlens_q: Tensor,
    max_seqlen_q: int,
    seqused_k: Tensor,
    max_seqlen_k: int,
    softmax_scale: float,
    causal: bool,
    block_table: Tensor,
    scheduler_metadata: Tensor | None,
    num_splits: int,
    k_descale: Tensor,
    v_descale: Tensor,
    **others: Any,
) -> None:
    """Attention over pages. q, out: [Q, H, D]; k, v: [P, n, K, D]; block_table: [B, columns]."""
    num_rows, num_kv_heads = len(seqused_k), k.shape[2]
    assert out.shape == q.shape and q.shape[1] % num_kv_heads == 0 and q.shape[2] == k.shape[3]
    assert k.stride(-1) == v.stride(-1) == q.stride(-1) == out.stride(-1) == 1
    sizes = [stride * k.element_size() for stride in (*k.stride()[:3], *v.stride()[:3])]
    assert all(size % ALIGNED_BYTES == 0 for size in sizes), sizes
    for each in (cu_seqlens_q, seqused_k, block_table):
        assert each.dtype == torch.int32 and each.is_contiguous()
    assert len(cu_seqlens_q) == num_rows + 1 and len(block_table) == num_rows
    assert k_descale.shape == v_descale.shape == (num_rows, num_kv_heads)
    lengths, starts = seqused_k.tolist(), cu_seqlens_q.tolist()
    query_lens = [stop - start for start, stop in zip(starts, starts[1:], strict=False)]
    assert min(query_lens) >= 0 and max(query_lens) <= max_seqlen_q and starts[-1] <= len(q)
    assert max(lengths) <= max_seqlen_k
    if scheduler_metadata is not None:
        assert scheduler_metadata.is_contiguous()
        assert len(scheduler_metadata) == _plan_size(num_rows, causal, num_splits)
        assert scheduler_metadata[:num_rows].equal(seqused_k), "a plan of other lengths"
        assert scheduler_metadata[-1] == num_kv_heads, "a plan of other heads"
    for row in range(num_rows):
        own = slice(starts[row], starts[row + 1])
        pages = block_table[row, : -(-lengths[row] // k.shape[1])].long()
        keys, values = (each[pages].flatten(0, 1)[: lengths[row]].float() for each in (k, v))
        out[own] = _attend(q[own].float(), keys, values, softmax_scale, causal).to(out)


def _attend(queries: Tensor, keys: Tensor, values: Tensor, scale: float, causal: bool) -> Tensor:
    """The queries are the last of the tokens. queries: [q, H, D]; keys, values: [T, K, D]."""
    if not len(queries):
        return queries
    group = queries.shape[1] // keys.shape[1]
    keys, values = (each.repeat_interleave(group, dim=1) for each in (keys, values))
    products = torch.einsum("qhd,thd->hqt", queries, keys) * scale
    if causal:
        last = torch.arange(len(queries)) + len(keys) - len(queries)
        hidden = torch.arange(len(keys)) > last.unsqueeze(1)
        products = products.masked_fill(hidden, float("-inf"))
    return torch.einsum("hqt,thd->qhd", products.softmax(dim=-1).nan_to_num(), values)


def plan(
    *,
    batch_size: int,
    num_heads_q: int,
    num_heads_kv: int,
    cache_seqlens: Tensor,
    cu_seqlens_q: Tensor,
    causal: bool,
    num_splits: int,
    **others: Any,
) -> Tensor:
    """In place of FlashAttention 3's plan: what it is a plan of."""
    assert len(cache_seqlens) == len(cu_seqlens_q) - 1 == batch_size
    assert cache_seqlens.dtype == torch.int32 and num_heads_q % num_heads_kv == 0
    planned = torch.zeros(_plan_size(batch_size, causal, num_splits), dtype=torch.int32)
    planned[:batch_size] = cache_seqlens
    planned[-1] = num_heads_kv
    return planned


def _plan_size(num_rows: int, causal: bool, num_splits: int) -> int:
    """Integers of FlashAttention 3's plan, for paged keys."""
    is_split = num_rows <= SPLIT_ROWS and num_splits > 1
    return 1 + -(-num_rows // 4) * 4 * (1 + is_split + causal)


def write(
    key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor, slots: Tensor, *_: Any
) -> None:
    """Tokens to their slots. key, value: [.., K, D]; caches: [P, n, K, D]; slots: [tokens]."""
    is_real = slots >= 0
    pages, places = slots[is_real] // key_cache.shape[1], slots[is_real] % key_cache.shape[1]
    key_cache[pages, places] = key[: len(slots)][is_real]
    value_cache[pages, places] = value[: len(slots)][is_real]

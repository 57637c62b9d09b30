"""Once at start-up: whether the kernel reads kv heads with blocks of their own as torch does.

Pages of one kv head are a view that vLLM's kernels were not written for: blocks overlap, and there
are many times as many. Whichever kernel it is, of whichever version, is asked before it serves:
an attention of sham rows through the builder and the implementation that serve, over blocks that
no request holds yet, beside the same in torch. The fill kernel of the table is compiled by it, too.

Shapes: R rows, K kv heads, G query heads per kv head, T query tokens, C columns of a row, n tokens
per block, L tokens of a row, D head size.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from vllm_spindle.engine.refusals import Refusal, raise_if_any
from vllm_spindle.engine.sham_rows import (
    NUM_COLUMNS,
    ShamRows,
    common_metadata,
    sham_batches,
)
from vllm_spindle.engine.step import HeadRows

TOLERANCE = 0.05  # of the largest output: bfloat16 stays below a fifth, a wrong page is far above


def check_heads(
    builder: Any,
    attention: Any,
    pretend: Callable[[HeadRows], AbstractContextManager[None]],
    *,
    num_layers: int,
    max_rows: int,
    num_columns: int,
) -> None:
    """Nothing happens if every answer is right.

    Args:
        builder: our metadata builder of the band.
        attention: its first layer.
        pretend: makes rows those of the running step.
        num_layers: of the band.
        max_rows: most rows of a step.
        num_columns: of the band's block table; without five of them no row is reduced.

    Raises:
        ValueError: by name, with what to use instead.
    """
    if num_columns < NUM_COLUMNS:
        return
    _, num_kv_heads, block_size, _ = attention.kv_cache.shape
    is_large = attention.kv_cache.device.type != "cpu"
    own = block_size, num_kv_heads, num_layers, max_rows, num_columns
    for rows in sham_batches(*own, is_large=is_large):
        try:
            with pretend(rows.heads):
                error = largest_error(builder, attention, rows, num_columns)
        except RuntimeError as failure:
            raise ValueError(str(_refusal(attention, f"its kernel says: {failure}"))) from failure
        # Not above, so that what is not a number is refused, too.
        if not error <= TOLERANCE:
            raise_if_any([_refusal(attention, f"its kernel is off by {error:.2f} there")])


def _refusal(attention: Any, reason: str) -> Refusal:
    name = attention.attn_backend.get_name()
    others = " or ".join(each for each in ("FLASH_ATTN", "TRITON_ATTN") if each != name)
    return Refusal(
        "budget",
        "measured",
        f"kv heads with blocks of their own are not read right by {name} on this machine: {reason}",
        f"use budget uniform, or --attention-backend {others}",
    )


@torch.inference_mode()
def largest_error(builder: Any, attention: Any, rows: ShamRows, num_columns: int) -> float:
    """Of the kernel, relative to the largest output; the step must have these rows.

    Args:
        builder: our metadata builder of the band.
        attention: its first layer.
        rows: of the step.
        num_columns: of the band's block table.
    """
    kv_cache = attention.kv_cache
    block_size, device = kv_cache.shape[2], kv_cache.device
    most = max(NUM_COLUMNS, -(-int(rows.lengths.max()) // block_size))
    # A block may be in many rows, and in one more than once: they are only read.
    ids = torch.arange(1, min(len(kv_cache), 8 + 3 * most))
    places = torch.arange(len(rows.lengths)).unsqueeze(1) * 3 + torch.arange(most) * 5
    table = ids[places % len(ids)].int().to(device)
    random = torch.Generator().manual_seed(0)
    tokens = torch.randn(len(ids), *kv_cache.shape[1:], generator=random)
    kv_cache[ids.to(device)] = tokens.to(kv_cache)
    num_tokens = int(rows.query_lens.sum())
    shape = num_tokens, attention.num_heads, attention.head_size
    query = torch.randn(shape, generator=random).to(kv_cache)
    own = query[:, : attention.num_kv_heads].contiguous()
    output = torch.empty_like(query)
    metadata = builder.build(0, common_metadata(rows, table, num_columns))
    attention.impl.forward(attention, query, own, own, kv_cache, metadata, output)
    should = expected(rows, table, query, kv_cache, attention.impl.scale)
    kv_cache[ids.to(device)] = 0
    return float((output.float() - should).abs().max() / should.abs().max())


def expected(
    rows: ShamRows, table: Tensor, query: Tensor, kv_cache: Tensor, scale: float
) -> Tensor:
    """Attention of the band's first layer in torch, page by page as ``HeadRows`` deals them out.

    Args:
        rows: the step.
        table: block ids. [R, C].
        query: [T, K * G, D].
        kv_cache: [B, K, n, 2 * D].
        scale: softmax scale.

    Returns:
        [T, K * G, D], float32.
    """
    num_kv_heads, block_size, width = kv_cache.shape[1:]
    columns, slots = rows.heads.source_pages(0, table.shape[1])  # [K, R, C] each
    blocks = table.cpu().long().expand(num_kv_heads, -1, -1).gather(2, columns)
    lengths = rows.lengths - rows.heads.skipped_blocks(0) * block_size  # [K, R]
    first, outputs = 0, []
    for row, query_len in enumerate(rows.query_lens.tolist()):
        tokens = kv_cache[blocks[:, row].to(table.device), slots[:, row].to(table.device)]
        keys, values = tokens.flatten(1, 2).float().split(width // 2, dim=-1)  # [K, L, D]
        own = query[first : first + query_len].float().unflatten(1, (num_kv_heads, -1))
        first += query_len
        products = torch.einsum("tkgd,kld->kgtl", own, keys) * scale
        last = lengths[:, row].unsqueeze(1) - query_len + torch.arange(query_len)  # [K, t]
        seen = torch.arange(keys.shape[1]) <= last.unsqueeze(-1)
        products.masked_fill_(~seen.unsqueeze(1).to(table.device), float("-inf"))
        outputs.append(torch.einsum("kgtl,kld->tkgd", products.softmax(dim=-1), values))
    return torch.cat(outputs).flatten(1, 2)

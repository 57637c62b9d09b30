"""Kept tokens moved inside the paged cache on a GPU: launches ``triton_compaction``.

Shapes: R blocks of a region, K kv heads, n tokens per block, D head size.

No call waits for the device or looks at what is on it. Memory: the kept tokens once more.
"""

import torch
from torch import Tensor

from vllm_spindle.kernels.triton_compaction import gather_pages, write_pages

ROW_ELEMENTS = 4096  # of a program


def compact(
    kv_cache: Tensor,
    block_ids: Tensor,
    positions: Tensor,
    region: Tensor,
    *,
    heads: Tensor | None = None,
) -> None:
    """Fill a region's pages with tokens of the prompt, wherever the two overlap.

    Args:
        kv_cache: a layer's cache, the last axis contiguous. [blocks, K, n, 2 * D].
        block_ids: the prompt's, int64. [at least as far as the positions go].
        positions: of the tokens that go into each page, int64, the last axis contiguous. [R, K, n].
        region: the region's block ids, int64. [R].
        heads: kv head that each page's tokens are of, int32, contiguous; None where page ``(r, k)``
            holds tokens of head k. [R, K].

    Raises:
        ValueError: if the tensors do not fit one another.
    """
    _, num_heads, block_size, width = kv_cache.shape
    pages = (len(region), num_heads)
    if positions.shape != (*pages, block_size) or (heads is not None and heads.shape != pages):
        raise ValueError(
            f"{pages} pages of {block_size} tokens, got positions {tuple(positions.shape)} "
            f"and heads {None if heads is None else tuple(heads.shape)}"
        )
    if kv_cache.stride(-1) != 1 or positions.stride(-1) != 1:
        raise ValueError("the last axis of cache and positions must be contiguous")
    if not len(region):
        return
    width_pad = 1 << (width - 1).bit_length()
    num_rows = max(1, min(1 << (block_size - 1).bit_length(), ROW_ELEMENTS // width_pad))
    grid = (len(region) * num_heads, -(-block_size // num_rows))
    shape = {
        "NUM_HEADS": num_heads,
        "N": block_size,
        "W": width,
        "WIDTH_PAD": width_pad,
        "NUM_ROWS": num_rows,
    }
    staged = torch.empty(*pages, block_size, width, dtype=kv_cache.dtype, device=kv_cache.device)
    strides = kv_cache.stride()[:3]
    gather_pages[grid](
        staged, kv_cache, positions, region if heads is None else heads, block_ids,
        *positions.stride()[:2], *strides, **shape, HAS_HEADS=heads is not None,
    )  # fmt: skip
    write_pages[grid](kv_cache, staged, region, *strides, **shape)

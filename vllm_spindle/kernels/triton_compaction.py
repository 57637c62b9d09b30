"""Kept tokens moved inside the paged cache, in Triton for CUDA.

Where tokens come from and where they go overlaps: ``gather_pages`` reads all of them into a staging
buffer before ``write_pages`` writes any. Nothing else of the prompt is read. ``device_compaction``
launches. Slow twin, and what a CPU runs: vLLM's own cache write after ``core.eviction``.

Shapes: R blocks of a region, K kv heads, n tokens per block, W elements of a token: its key, then
its value. A page is what a block holds of one kv head; page ``(r, k)`` of the region may hold
tokens of another head. Cache: [blocks, K, n, W], heads or tokens outermost in a block.
"""

import triton
import triton.language as tl


@triton.jit(do_not_specialize_on_alignment=("table_ptr", "positions_ptr", "heads_ptr"))
def gather_pages(
    staged_ptr, cache_ptr, positions_ptr, heads_ptr, table_ptr,
    stride_position_block, stride_position_head, stride_block, stride_head, stride_slot,
    NUM_HEADS: tl.constexpr, N: tl.constexpr, W: tl.constexpr, WIDTH_PAD: tl.constexpr,
    NUM_ROWS: tl.constexpr, HAS_HEADS: tl.constexpr,
):  # fmt: skip
    """The tokens of one page, into the staging buffer. Grid: R * K, rows of a page.

    Args:
        staged_ptr: [R, K, n, W].
        cache_ptr: [blocks, K, n, W].
        positions_ptr: of the tokens in the prompt, int64. [R, K, n].
        heads_ptr: kv head that a page's tokens are of, int32; read with HAS_HEADS, else that of the
            page itself. [R, K].
        table_ptr: block ids of the prompt, int64.
    """
    page = tl.program_id(0)
    slots = tl.program_id(1) * NUM_ROWS + tl.arange(0, NUM_ROWS)
    inside = slots < N
    positions_ptr += (page // NUM_HEADS).to(tl.int64) * stride_position_block
    positions_ptr += page % NUM_HEADS * stride_position_head
    positions = tl.load(positions_ptr + slots, mask=inside, other=0)
    blocks = tl.load(table_ptr + positions // N, mask=inside, other=0).to(tl.int64)
    at = blocks * stride_block + positions % N * stride_slot
    head = page % NUM_HEADS
    if HAS_HEADS:
        head = tl.load(heads_ptr + page)
    at += head.to(tl.int64) * stride_head
    dims = tl.arange(0, WIDTH_PAD)
    in_row = inside[:, None] & (dims < W)[None, :]
    rows = tl.load(cache_ptr + at[:, None] + dims[None, :], mask=in_row, other=0)
    at = (page.to(tl.int64) * N + slots) * W
    tl.store(staged_ptr + at[:, None] + dims[None, :], rows, mask=in_row)


@triton.jit(do_not_specialize_on_alignment=("region_ptr",))
def write_pages(
    cache_ptr, staged_ptr, region_ptr, stride_block, stride_head, stride_slot,
    NUM_HEADS: tl.constexpr, N: tl.constexpr, W: tl.constexpr, WIDTH_PAD: tl.constexpr,
    NUM_ROWS: tl.constexpr,
):  # fmt: skip
    """The staged tokens of one page, into the cache. Grid: R * K, rows of a page.

    Args:
        cache_ptr: [blocks, K, n, W].
        staged_ptr: [R, K, n, W].
        region_ptr: block ids, int64. [R].
    """
    page = tl.program_id(0)
    slots = tl.program_id(1) * NUM_ROWS + tl.arange(0, NUM_ROWS)
    dims = tl.arange(0, WIDTH_PAD)
    in_row = (slots < N)[:, None] & (dims < W)[None, :]
    at = (page.to(tl.int64) * N + slots) * W
    rows = tl.load(staged_ptr + at[:, None] + dims[None, :], mask=in_row, other=0)
    at = tl.load(region_ptr + page // NUM_HEADS).to(tl.int64) * stride_block
    at += (page % NUM_HEADS).to(tl.int64) * stride_head + slots * stride_slot
    tl.store(cache_ptr + at[:, None] + dims[None, :], rows, mask=in_row)

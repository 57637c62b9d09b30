"""One layer's table of a batch with a row for each kv head, in Triton for CUDA.

One launch where torch needs two dozen, for every layer of every step. ``device_head_pages``
launches. Slow twin, and what a CPU runs: ``engine.step.HeadRows.source_pages``.

Shapes: R rows, K kv heads, C columns of the block table.
"""

import triton
import triton.language as tl


@triton.jit(
    do_not_specialize=("stride_pages_head", "stride_lengths_head", "num_columns", "pages_apart"),
    do_not_specialize_on_alignment=(
        "pages_ptr", "head_lengths_ptr", "table_ptr", "lengths_ptr",
        "prefix_ptr", "first_ptr", "tail_ptr", "held_ptr",
    ),
)  # fmt: skip
def fill_head_pages(
    pages_ptr, head_lengths_ptr, table_ptr, lengths_ptr, prefix_ptr, first_ptr, tail_ptr, held_ptr,
    stride_pages_head, stride_lengths_head, stride_table, stride_held, num_columns, pages_apart,
    NUM_HEADS: tl.constexpr, HEADS_PAD: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
):  # fmt: skip
    """A tile of a kv head's row, as far as it is read; with the first one its length.

    Grid: R, K, tiles of columns. All integers are int32.

    Args:
        pages_ptr: written. [K, R, C].
        head_lengths_ptr: written. [K, R].
        table_ptr: block ids of the natural rows. [R, C].
        lengths_ptr: of the natural rows. [R].
        prefix_ptr, first_ptr, tail_ptr: as in ``HeadRows``. [R] each.
        held_ptr: pages of the region that each kv head of the layer holds. [K, R].
        pages_apart: of two neighbouring blocks.
    """
    row, head = tl.program_id(0), tl.program_id(1)
    heads = tl.arange(0, HEADS_PAD)
    all_held = tl.load(held_ptr + heads * stride_held + row, mask=heads < NUM_HEADS, other=0)
    held = tl.sum(tl.where(heads == head, all_held, 0))
    before = tl.sum(tl.where(heads < head, all_held, 0))
    prefix, first = tl.load(prefix_ptr + row), tl.load(first_ptr + row)
    skipped = tl.load(tail_ptr + row) - prefix - held
    # A padded row's length is 0, by which vLLM's kernels divide if it has a query.
    length = tl.maximum(tl.load(lengths_ptr + row) - skipped * BLOCK_SIZE, 1)
    if tl.program_id(2) == 0:
        tl.store(head_lengths_ptr + head * stride_lengths_head + row, length)
    column = tl.program_id(2) * TILE + tl.arange(0, TILE)
    is_read = (column < num_columns) & (column < tl.cdiv(length, BLOCK_SIZE))
    in_region = (column >= prefix) & (column < prefix + held)
    page = tl.where(in_region, before + column - prefix, 0)
    source = tl.where(column < prefix, column, column + skipped)
    source = tl.where(in_region, first + page // NUM_HEADS, source)
    slot = tl.where(in_region, page % NUM_HEADS, head)
    blocks = tl.load(table_ptr + row.to(tl.int64) * stride_table + source, mask=is_read, other=0)
    pages_ptr += head.to(tl.int64) * stride_pages_head + row.to(tl.int64) * num_columns
    tl.store(pages_ptr + column, blocks * pages_apart + slot, mask=is_read)

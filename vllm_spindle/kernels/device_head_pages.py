"""One layer's table of a batch with a row for each kv head on a GPU: launches its Triton kernel.

Shapes: R rows, K kv heads, C columns of the block table.

No call waits for the device or looks at what is on it. Memory: none.
"""

from torch import Tensor

from vllm_spindle.kernels.triton_head_pages import fill_head_pages

TILE = 256  # columns of a program


def fill(
    head_pages: Tensor,
    head_lengths: Tensor,
    table: Tensor,
    lengths: Tensor,
    starts: tuple[Tensor, Tensor, Tensor],
    held: Tensor,
    *,
    block_size: int,
    pages_apart: int,
) -> None:
    """Write the pages of every kv head's rows, as far as they are read, and the lengths.

    All are int32, the last axis contiguous.

    Args:
        head_pages: out, rows contiguous. [K, R, C].
        head_lengths: out. [K, R].
        table: natural block ids. [R, C].
        lengths: natural. [R].
        starts: prefix, first and tail block of each row. [R] each.
        held: pages of the region that each kv head of the layer holds. [K, R].
        block_size: tokens per block.
        pages_apart: of two neighbouring blocks.

    Raises:
        ValueError: if a tensor is not laid out as the kernel reads it.
    """
    num_heads, num_rows, num_columns = head_pages.shape
    if any(each.stride(-1) != 1 for each in (head_pages, head_lengths, table, held, *starts)):
        raise ValueError("the last axis of every tensor must be contiguous")
    if head_pages.stride(1) != num_columns:
        raise ValueError(f"rows of pages must be contiguous, got strides {head_pages.stride()}")
    grid = (num_rows, num_heads, -(-num_columns // TILE))
    fill_head_pages[grid](
        head_pages, head_lengths, table, lengths, *starts, held,
        head_pages.stride(0), head_lengths.stride(0), table.stride(0), held.stride(0),
        num_columns, pages_apart,
        NUM_HEADS=num_heads, HEADS_PAD=1 << (num_heads - 1).bit_length(), BLOCK_SIZE=block_size,
        TILE=TILE,
    )  # fmt: skip

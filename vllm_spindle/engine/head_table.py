"""Kv heads of one layer that hold different numbers of blocks, as sequences of their own.

A block of the pool holds one page per kv head. In the reduced region the pages of a layer belong
to whichever head needs them; everywhere else page ``h`` is kv head ``h``'s. So the stock kernel is
given a batch of K times the rows, each with one kv head, over the same memory seen as pages:

    blocks      [ first  | first+1 | tail .. ]        K = 2, head 0 holds 3 pages, head 1 one
    pages       [ 0 0    | 0 1     | 0 1  .. ]

Shapes: R rows, K kv heads, C columns of the block table, T tokens of the step.
"""

import torch
from torch import Tensor
from vllm.v1.attention.backend import CommonAttentionMetadata

from vllm_spindle.engine.step import HeadRows


def pages(kv_cache: Tensor) -> tuple[Tensor, int]:
    """A layer's cache as pages of one kv head each.

    Args:
        kv_cache: [B, K, N, 2 * D], heads or tokens outermost in a block.

    Returns:
        The same memory, [.., 1, N, 2 * D], and how many pages a block is away from the next one:
        page ``block * that + head`` is the head's in the block.
    """
    num_blocks, num_heads, block_size, width = kv_cache.shape
    block, head, token, element = kv_cache.stride()
    apart = block // head
    shape = ((num_blocks - 1) * apart + num_heads, 1, block_size, width)
    return kv_cache.as_strided(shape, (head, head, token, element)), apart


def head_starts(starts: Tensor, num_kv_heads: int, num_tokens: int) -> Tensor:
    """Where the queries of each kv head's rows begin, head by head: ``k * T + start``.

    Args:
        starts: of the rows, in the step. [R].
        num_kv_heads: K.
        num_tokens: T, padding included.

    Returns:
        And, last, where all end. [K * R + 1].
    """
    first = torch.arange(num_kv_heads + 1, dtype=starts.dtype, device=starts.device) * num_tokens
    own = (starts + first[:-1].unsqueeze(1)).flatten()
    return torch.cat([own, first[-1:]])


class HeadTable:
    """Tables and lengths of one layer of a band, new in every step."""

    def __init__(self, layer: int, num_kv_heads: int, block_size: int) -> None:
        """Args: layer: within its band; num_kv_heads: of this rank."""
        self._layer = layer
        self._num_kv_heads = num_kv_heads
        self._block_size = block_size
        self._rows: HeadRows | None = None
        self._columns = self._slots = self._skipped_tokens = torch.empty(0)

    def split(
        self, common: CommonAttentionMetadata, rows: HeadRows, pages_apart: int
    ) -> CommonAttentionMetadata:
        """The step's metadata with a row for each kv head, head by head.

        Args:
            common: natural tables, [R, C], and lengths, [R].
            rows: R rows.
            pages_apart: of two neighbouring blocks, see ``pages``.
        """
        table, lengths = common.block_table_tensor, common.seq_lens
        self._take(rows, table, lengths)
        num_heads, num_tokens = self._num_kv_heads, common.num_actual_tokens
        blocks = table.expand(num_heads, -1, -1).gather(2, self._columns)
        return common.replace(
            block_table_tensor=(blocks * pages_apart + self._slots).flatten(0, 1),
            seq_lens=(lengths - self._skipped_tokens).flatten(),
            query_start_loc=head_starts(common.query_start_loc[:-1], num_heads, num_tokens),
            query_start_loc_cpu=head_starts(common.query_start_loc_cpu[:-1], num_heads, num_tokens),
            num_reqs=num_heads * len(lengths),
            num_actual_tokens=num_heads * num_tokens,
            seq_lens_cpu_upper_bound=None,
            _num_computed_tokens_cache=None,
        )

    def _take(self, rows: HeadRows, table: Tensor, lengths: Tensor) -> None:
        """Where each column is read from; the same as long as the rows are."""
        if rows is self._rows:
            return
        self._rows = rows
        self._columns, slots = rows.source_pages(self._layer, table.shape[1])
        self._slots = slots.to(table.dtype)
        skipped = rows.skipped_blocks(self._layer) * self._block_size
        self._skipped_tokens = skipped.to(lengths.dtype)

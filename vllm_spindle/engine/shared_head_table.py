"""One table of a band whose kv heads hold different numbers of blocks, filled layer by layer.

``HeadTable`` is one layer's, made anew in every step. A captured graph reads its tables by address,
and K times the rows for each layer would be gigabytes. So the layers of a band, which run one after
the other, share one table: each of them fills it within its own attention call, in the graph if it
is one, with shapes of the capture, by a Triton kernel or by torch. What changes from step to step
are a few integers for each row, in a buffer that is rewritten before the forward.

Shapes: R rows with padding, r rows of the step, K kv heads, C columns of the block table, T tokens
with padding, Lb layers of the band; A rows of each kv head, R or one more.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from vllm.v1.attention.backend import CommonAttentionMetadata

from vllm_spindle.core.transfer import to_device
from vllm_spindle.engine.head_table import head_starts
from vllm_spindle.engine.step import HeadRows

STARTS = 3  # prefix, first and tail block of a row


@dataclass(frozen=True)
class HeadBatch:
    """A step's, or a capture's, parts of the buffers.

    Attributes:
        split: the metadata with a row for each kv head; its table and lengths are the running
            layer's.
        table: natural. [R, C].
        lengths: natural. [R].
        rows: geometry. R rows, int32.
        head_pages: the part of ``split``'s table that layers fill. [K, R, C].
        head_lengths: of its lengths. [K, R].
        block_size: tokens per block.
        pages_apart: of two neighbouring blocks, see ``head_table.pages``.
        with_kernel: whether a Triton kernel fills them.
    """

    split: CommonAttentionMetadata
    table: Tensor
    lengths: Tensor
    rows: HeadRows
    head_pages: Tensor
    head_lengths: Tensor
    block_size: int
    pages_apart: int
    with_kernel: bool

    def fill(self, layer: int) -> None:
        """Make the table a layer's. layer: within its band."""
        if self.with_kernel:
            self._fill_by_kernel(layer)
        else:
            self._fill_by_torch(layer)

    def _fill_by_kernel(self, layer: int) -> None:
        # Not before vLLM has started, as it decides which Triton there is.
        from vllm_spindle.kernels import device_head_pages

        device_head_pages.fill(
            self.head_pages,
            self.head_lengths,
            self.table,
            self.lengths,
            (self.rows.prefix_blocks, self.rows.first_block, self.rows.tail_block),
            self.rows.head_blocks[layer],
            block_size=self.block_size,
            pages_apart=self.pages_apart,
        )

    def _fill_by_torch(self, layer: int) -> None:
        num_heads, num_columns = len(self.head_pages), self.table.shape[1]
        columns, slots = self.rows.source_pages(layer, num_columns)
        blocks = self.table.expand(num_heads, -1, -1).gather(2, columns.to(torch.int64))
        torch.add(slots, blocks, alpha=self.pages_apart, out=self.head_pages)
        skipped_tokens = self.rows.skipped_blocks(layer) * self.block_size
        # A padded row's length is 0, by which vLLM's kernels divide if it has a query.
        self.head_lengths.copy_((self.lengths - skipped_tokens).clamp_(min=1))


class SharedHeadTable:
    """The buffers of a band, allocated once, for as many rows as there can be."""

    def __init__(
        self,
        num_layers: int,
        num_kv_heads: int,
        block_size: int,
        max_rows: int,
        device: torch.device,
        *,
        with_kernel: bool,
    ) -> None:
        """For one band of one rank.

        Args:
            num_layers: Lb.
            num_kv_heads: of this rank.
            block_size: tokens per block.
            max_rows: the most that R can be.
            device: of the tables.
            with_kernel: whether a Triton kernel fills them.
        """
        self._with_kernel = with_kernel
        self._num_kv_heads = num_kv_heads
        self._block_size = block_size
        self._max_rows = max_rows
        lines = STARTS + num_layers * num_kv_heads
        self._ints = torch.zeros(lines, max_rows, dtype=torch.int32, device=device)
        most = num_kv_heads * (max_rows + 1)
        self._lengths = torch.ones(most, dtype=torch.int32, device=device)
        self._starts = torch.zeros(most + 1, dtype=torch.int32, device=device)
        self._one_each = torch.arange(most + 1, dtype=torch.int32, device=device)
        self._table: Tensor | None = None
        self._written: HeadRows | None = None

    def batch(
        self,
        common: CommonAttentionMetadata,
        rows: HeadRows | None,
        pages_apart: int,
        *,
        with_rest: bool,
    ) -> HeadBatch:
        """The step's parts, its geometry written.

        Padding comes after a head's last real token, and belongs to a row. If it were the last
        real one's, that row would have more queries, and its causal mask would be another.

        Args:
            common: natural tables, [R, C], and lengths, [R].
            rows: r rows; None if no row is reduced.
            pages_apart: see ``HeadBatch``.
            with_rest: whether there may be padding that is no row's, which then becomes a row of
                its own, behind each head's others; else every padded row has one token.
        """
        if rows is not self._written:
            self._write(rows)
        table, lengths = common.block_table_tensor, common.seq_lens
        num_heads, num_rows = self._num_kv_heads, len(lengths)
        own_rows = num_rows + with_rest
        pages = self._pages(table)[: num_heads * own_rows]
        head_lengths = self._lengths[: num_heads * own_rows]
        by_head = pages.view(num_heads, own_rows, -1), head_lengths.view(num_heads, own_rows)
        if with_rest:
            # As if it were a prompt, in the null block: what comes of it is nobody's, but a number.
            rest = common.num_actual_tokens - common.query_start_loc[num_rows]
            by_head[0][:, -1] = 0
            by_head[1][:, -1] = rest.clamp(1, table.shape[1] * self._block_size)
        on_host, on_device = self._query_starts(common, with_rest=with_rest)
        split = common.replace(
            block_table_tensor=pages,
            seq_lens=head_lengths,
            query_start_loc=on_device,
            query_start_loc_cpu=on_host,
            num_reqs=num_heads * own_rows,
            num_actual_tokens=num_heads * common.num_actual_tokens,
            seq_lens_cpu_upper_bound=None,
            _num_computed_tokens_cache=None,
        )
        return HeadBatch(
            split=split,
            table=table,
            lengths=lengths,
            rows=self._rows(num_rows),
            head_pages=by_head[0][:, :num_rows],
            head_lengths=by_head[1][:, :num_rows],
            block_size=self._block_size,
            pages_apart=pages_apart,
            with_kernel=self._with_kernel,
        )

    def _query_starts(
        self, common: CommonAttentionMetadata, *, with_rest: bool
    ) -> tuple[Tensor, Tensor]:
        """On the host, and on the device in a buffer. [K * A + 1] each."""
        num_heads, num_tokens = self._num_kv_heads, common.num_actual_tokens
        num_rows = len(common.seq_lens)
        own_rows = num_rows + with_rest
        num_starts = num_heads * own_rows + 1
        if num_tokens == num_rows and not with_rest:
            # One token each; of the step's own starts all padded rows' are the same.
            starts = self._one_each[:num_starts]
            return torch.arange(num_starts, dtype=torch.int32), starts
        starts = self._starts[:num_starts]
        starts.copy_(head_starts(common.query_start_loc[:own_rows], num_heads, num_tokens))
        host = head_starts(common.query_start_loc_cpu[:own_rows], num_heads, num_tokens)
        return host, starts

    def _pages(self, table: Tensor) -> Tensor:
        """The table's buffer, for natural tables of this width. [K * (most rows + 1), C]."""
        if self._table is None:
            most = self._num_kv_heads * (max(self._max_rows, len(table)) + 1)
            self._table = table.new_zeros(most, table.shape[1])
        if table.shape[1] != self._table.shape[1]:
            raise RuntimeError(
                f"spindle: a block table of {table.shape[1]} columns after one of "
                f"{self._table.shape[1]}; captured graphs read the first"
            )
        return self._table

    def _write(self, rows: HeadRows | None) -> None:
        """All rows in one copy that nothing waits for; the same as long as the rows are."""
        self._written = rows
        host = torch.zeros(self._ints.shape, dtype=torch.int32)
        if rows is not None:
            starts = torch.stack((rows.prefix_blocks, rows.first_block, rows.tail_block))
            lines = torch.cat([starts, rows.head_blocks.flatten(0, 1)])
            host[:, : lines.shape[1]] = lines
        self._ints.copy_(to_device(host, self._ints.device))

    def _rows(self, num_rows: int) -> HeadRows:
        """What is written, as rows."""
        ints = self._ints[:, :num_rows]
        return HeadRows(*ints[:STARTS], ints[STARTS:].unflatten(0, (-1, self._num_kv_heads)))

"""A band's block table and lengths as the stock kernel shall see them: reduced rows shifted.

Shapes: R rows with padding, r rows of the step, C columns of the block table.
"""

import torch
from torch import Tensor
from vllm.v1.attention.backend import CommonAttentionMetadata

from vllm_spindle.engine.step import BandRows


class ShiftedTable:
    """One table and one list of lengths, rewritten in place every step.

    A captured graph reads them again by address: they are allocated once, for as many rows as
    there can be. Each copy of a reduced region has its own, as the copies of a step are alive
    together.
    """

    def __init__(self, copy_idx: int, block_size: int, max_rows: int) -> None:
        """Args: copy_idx: of the region's copies; max_rows: the most that R can be."""
        self._copy_idx = copy_idx
        self._block_size = block_size
        self._max_rows = max_rows
        self._table: Tensor | None = None
        self._lengths: Tensor | None = None
        self._rows: BandRows | None = None
        self._source = self._skipped_tokens = torch.empty(0)

    def shift(
        self, common: CommonAttentionMetadata, rows: BandRows | None
    ) -> CommonAttentionMetadata:
        """The step's metadata with every reduced row starting at its held blocks.

        Args:
            common: natural tables, [R, C], and lengths, [R].
            rows: r rows; None if all are as they are.
        """
        table, lengths = common.block_table_tensor, common.seq_lens
        out_table, out_lengths = self._buffers(table, lengths)
        # No row is read further, and a table may be a hundred times as wide.
        read = slice(-(-common.max_seq_len // self._block_size))
        num_rows = 0
        if rows is not None:
            self._take(rows, table, lengths)
            num_rows = len(self._source)
            source, out = self._source[:, read], out_table[:num_rows, read]
            torch.gather(table[:num_rows], 1, source, out=out)
            torch.sub(lengths[:num_rows], self._skipped_tokens, out=out_lengths[:num_rows])
        if num_rows < len(table):  # padding, or a batch without reduced rows
            out_table[num_rows:, read] = table[num_rows:, read]
            out_lengths[num_rows:] = lengths[num_rows:]
        return common.replace(
            block_table_tensor=out_table,
            seq_lens=out_lengths,
            seq_lens_cpu_upper_bound=None,
            _num_computed_tokens_cache=None,
        )

    def _buffers(self, table: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        if self._table is None or self._lengths is None:
            self._table = table.new_zeros(max(self._max_rows, len(table)), table.shape[1])
            self._lengths = lengths.new_zeros(len(self._table))
        if len(table) > len(self._table) or table.shape[1] != self._table.shape[1]:
            raise RuntimeError(
                f"spindle: a block table of {tuple(table.shape)} after one of "
                f"{tuple(self._table.shape)}; captured graphs read the first"
            )
        return self._table[: len(table)], self._lengths[: len(lengths)]

    def _take(self, rows: BandRows, table: Tensor, lengths: Tensor) -> None:
        """Where each column is read from; the same as long as the rows are."""
        if rows is self._rows:
            return
        self._rows = rows
        on_device = rows.to(table.device)
        self._source = on_device.source_columns(self._copy_idx, table.shape[1])
        self._skipped_tokens = (on_device.skipped_blocks * self._block_size).to(lengths.dtype)

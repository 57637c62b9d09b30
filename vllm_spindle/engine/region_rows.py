"""A band's reduced rows with codebooks as the compiled kernels shall see them.

Shapes: R rows with padding, r reduced rows with codebooks.
"""

import torch
from vllm.v1.attention.backend import CommonAttentionMetadata

from vllm_spindle.core.transfer import to_device
from vllm_spindle.engine.step import CodebookRows
from vllm_spindle.kernels.decode_rows import NOT_MINE, DeviceRows

INTS_PER_ROW = 6  # starts, shapes, prefix


class RegionRows:
    """The kernel's arrays, rewritten in place every step: a captured graph reads them by address.

    They have a line for every row, so that nothing depends on how many of them are reduced; of
    the others the kernel reads no more than that they are not its own.
    """

    def __init__(self, block_size: int, max_rows: int, device: torch.device) -> None:
        """Args: max_rows: the most that R can be."""
        self._block_size = block_size
        self._max_rows = max_rows
        ints = torch.zeros(INTS_PER_ROW * max_rows, dtype=torch.int32, device=device)
        self._ints = ints
        self._starts = ints[: 2 * max_rows].view(max_rows, 2)
        self._shapes = ints[2 * max_rows : 5 * max_rows].view(max_rows, 3)
        self._prefix_blocks = ints[5 * max_rows :]
        self._tail_lens = torch.zeros(max_rows, dtype=torch.int32, device=device)
        self._written: CodebookRows | None = None
        self._write(None)

    def rows(self, common: CommonAttentionMetadata, codebooks: CodebookRows | None) -> DeviceRows:
        """The step's rows.

        Args:
            common: natural tables and lengths, R rows.
            codebooks: r rows; None if no row has codebooks.
        """
        num_rows = len(common.seq_lens)
        if codebooks is not self._written:
            self._write(codebooks)
        tail_lens = self._tail_lens[:num_rows]
        torch.sub(common.seq_lens, self._starts[:num_rows, 1] * self._block_size, out=tail_lens)
        return DeviceRows(
            block_table=common.block_table_tensor,
            starts=self._starts[:num_rows],
            shapes=self._shapes[:num_rows],
            tail_lens=tail_lens,
            query_start=common.query_start_loc[: num_rows + 1],
            prefix_blocks=self._prefix_blocks[:num_rows],
            max_query_len=_max_query_len(common, codebooks),
        )

    def _write(self, codebooks: CodebookRows | None) -> None:
        """All rows in one copy that nothing waits for; the same as long as the rows are."""
        self._written = codebooks
        most = self._max_rows
        host = torch.zeros(INTS_PER_ROW * most, dtype=torch.int32)
        starts, shapes = host[: 2 * most].view(most, 2), host[2 * most : 5 * most].view(most, 3)
        shapes[:, 2] = NOT_MINE
        if codebooks is not None:
            starts[codebooks.rows] = codebooks.starts
            shapes[codebooks.rows] = codebooks.shapes
            host[5 * most :][codebooks.rows] = codebooks.prefix_blocks
        self._ints.copy_(to_device(host, self._ints.device))


def _max_query_len(common: CommonAttentionMetadata, codebooks: CodebookRows | None) -> int:
    """Most query tokens of a reduced row; without any, of the capture that this may be."""
    if codebooks is None:
        return common.max_query_len
    starts, rows = common.query_start_loc_cpu, codebooks.rows
    return int((starts[rows + 1] - starts[rows]).max())

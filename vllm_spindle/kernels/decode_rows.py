"""What the decode kernels over codebook regions are told about the rows of a step.

Shapes: B rows, Q query tokens of all rows, W columns of the block table.
"""

from dataclasses import dataclass

from torch import Tensor

NOT_MINE = -1
"""Tokens of the region in ``shapes``, for a row whose output another kernel has written."""


@dataclass(frozen=True, slots=True)
class DeviceRows:
    """The rows of one step: int32 tensors on the device, contiguous.

    Attributes:
        block_table: block ids; prefix, region and tail of a row are runs of its columns. [B, W].
        starts: first column of the region and of the tail. [B, 2].
        shapes: key entries, value entries and tokens of the region; 0 tokens for none, NOT_MINE
            for a row to leave alone. [B, 3].
        tail_lens: dense tokens after the region, the query tokens included: they are the last of
            them; 0 for the region alone. [B].
        query_start: first query token of each row, and their number; a row of padding has no
            query tokens. [B + 1].
        prefix_blocks: columns, from the first on, of dense tokens before the region. [B].
        max_query_len: most query tokens of a row that is not left alone, or more.
    """

    block_table: Tensor
    starts: Tensor
    shapes: Tensor
    tail_lens: Tensor
    query_start: Tensor
    prefix_blocks: Tensor
    max_query_len: int

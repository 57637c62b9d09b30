"""Decode attention over codebook regions and dense tails on a GPU: launches ``triton_decode``.

Shapes: B rows, Q query tokens of all rows, K kv heads, G query heads per kv head, n tokens per
block, D head size, P rows of the rotary table, W columns of the block table, S splits.

No call waits for the device or looks at what is on it, so a CUDA graph can hold it: then
``num_splits`` and ``max_query_len`` are those of the capture.
"""

import torch
from torch import Tensor

from vllm_spindle.kernels.decode_rows import DeviceRows
from vllm_spindle.kernels.triton_decode import decode_split, merge_splits

LOG2_E = 1.4426950408889634
LEAST_QUERY_ROWS = 16  # of a product on tensor cores
MAX_SPLITS = 32
MAX_SPLIT_BYTES = 256 << 20  # of the splits' outputs, float32
PROGRAMS_PER_MULTIPROCESSOR = 2  # as many as have room for their registers


class DeviceRegionDecoder:
    """The kernels with what does not change from step to step."""

    def __init__(
        self, cos_sin: Tensor, scale: float, *, tile_tokens: int = 64, num_warps: int = 4
    ) -> None:
        """Prepare; nothing is compiled before the first call.

        Args:
            cos_sin: the model's rotary table on the device, cosines then sines. [P, D].
            scale: softmax scale.
            tile_tokens: tokens per step of the online softmax, a power of two from 16 on.
            num_warps: of a program.

        Raises:
            ValueError: if the head size is not a multiple of 16 from 32 to 256.
        """
        head_size = cos_sin.shape[1]
        if head_size % 16 or not 32 <= head_size <= 256:
            raise ValueError(f"head_size must be a multiple of 16 from 32 to 256, got {head_size}")
        self._cos_sin = cos_sin.contiguous()
        self._scale_log2 = scale * LOG2_E
        # A wide head's tile would not fit the registers.
        self._tile = tile_tokens if head_size <= 128 else max(16, tile_tokens // 2)
        self._num_warps = num_warps

    def __call__(
        self,
        query: Tensor,
        output: Tensor,
        kv_cache: Tensor,
        rows: DeviceRows,
        *,
        num_splits: int | None = None,
    ) -> Tensor:
        """Attend; the outputs go to ``output``. Where a query sees nothing, they are zero.

        Args:
            query: rotated queries, the last axis contiguous. [Q, K * G, D], bf16 or float16.
            output: the last axis contiguous. [Q, K * G, D].
            kv_cache: [blocks, K, n, 2 * D] in the queries' dtype, the last axis contiguous.
            rows: the step.
            num_splits: programs to share a row's tokens; None for as many as fill the device.

        Returns:
            Log-sum-exp of the scaled products, natural, -inf where a query sees nothing: what
            vLLM's ``merge_attn_states`` takes beside another kernel's; undefined for tokens of
            rows that are left alone. [K * G, Q], float32.

        Raises:
            ValueError: if the tensors do not fit one another.
        """
        num_tokens, num_heads, head_size = query.shape
        num_kv_heads, block_size = kv_cache.shape[1:3]
        self._check(query, output, kv_cache)
        num_query_rows = max(LEAST_QUERY_ROWS, _power_of_two(num_heads // num_kv_heads))
        tokens_each = num_query_rows // (num_heads // num_kv_heads)
        num_query_blocks = max(1, -(-rows.max_query_len // tokens_each))
        num_rows = len(rows.tail_lens)
        lse = query.new_empty(num_heads, num_tokens, dtype=torch.float32)
        if num_tokens == 0 or num_rows == 0:
            return lse
        grid = (num_rows * num_query_blocks, num_kv_heads)
        if num_splits is None:
            num_splits = _choose_splits(grid[0] * grid[1], query)
        split_output, split_lse = output.unsqueeze(0), lse.unsqueeze(0)
        if num_splits > 1:
            split_output = query.new_empty(num_splits, *query.shape, dtype=torch.float32)
            # Tokens of rows that are left alone keep this mark, and merging leaves them alone.
            split_lse = lse.new_full((num_splits, *lse.shape), float("inf"))
        head_pad = _power_of_two(head_size)
        decode_split[(*grid, num_splits)](
            query, split_output, split_lse, kv_cache.view(torch.int16), self._cos_sin,
            rows.block_table, rows.starts, rows.shapes, rows.tail_lens, rows.query_start,
            rows.prefix_blocks, self._scale_log2, num_query_blocks,
            *query.stride()[:2], *split_output.stride()[:3], *split_lse.stride()[:2],
            *kv_cache.stride()[:3], self._cos_sin.stride(0), rows.block_table.stride(0),
            GROUP=num_heads // num_kv_heads, N=block_size, D=head_size,
            HALF_PAD=head_pad // 2, HEAD_PAD=head_pad,
            NUM_QUERY_ROWS=num_query_rows, TILE=self._tile, num_warps=self._num_warps,
        )  # fmt: skip
        if num_splits > 1:
            merge_splits[(num_tokens, num_heads)](
                output, lse, split_output, split_lse, rows.query_start, num_rows, num_splits,
                *output.stride()[:2], lse.stride(0),
                *split_output.stride()[:3], *split_lse.stride()[:2],
                D=head_size, HEAD_PAD=head_pad, num_warps=1,
            )  # fmt: skip
        return lse

    def _check(self, query: Tensor, output: Tensor, kv_cache: Tensor) -> None:
        _, num_heads, head_size = query.shape
        if query.dtype not in (torch.bfloat16, torch.float16) or kv_cache.dtype != query.dtype:
            raise ValueError(
                "queries and cache must both be bfloat16 or both float16, got "
                f"{query.dtype} and {kv_cache.dtype}"
            )
        if self._cos_sin.shape[1] != head_size or kv_cache.shape[3] != 2 * head_size:
            raise ValueError(
                f"a head size of {head_size} needs a cache of {2 * head_size} and a rotary table "
                f"of {head_size}, got {kv_cache.shape[3]} and {self._cos_sin.shape[1]}"
            )
        if num_heads % kv_cache.shape[1] or output.shape != query.shape:
            raise ValueError(
                f"{num_heads} query heads over {kv_cache.shape[1]} kv heads, "
                f"queries {tuple(query.shape)}, output {tuple(output.shape)}"
            )
        if any(tensor.stride(-1) != 1 for tensor in (query, output, kv_cache)):
            raise ValueError("the last axis of queries, output and cache must be contiguous")


def _choose_splits(num_programs: int, query: Tensor) -> int:
    """Splits that give every multiprocessor a few programs; 1 where the interpreter runs them.

    From shapes alone, so that it is the capture's for every replay.
    """
    if query.device.type == "cpu":
        return 1
    multiprocessors = torch.cuda.get_device_properties(query.device).multi_processor_count
    wanted = PROGRAMS_PER_MULTIPROCESSOR * multiprocessors // num_programs
    affordable = MAX_SPLIT_BYTES // (4 * query.numel())
    return max(1, min(MAX_SPLITS, wanted, affordable))


def _power_of_two(number: int) -> int:
    """The next one from the number on: 12 -> 16."""
    return 1 << (number - 1).bit_length()

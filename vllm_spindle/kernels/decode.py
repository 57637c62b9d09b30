"""Decode attention over codebook regions and dense tails: torch tensors in, compiled kernel.

Shapes: B rows, Q query tokens of all rows, K kv heads, G query heads per kv head, n tokens per
block, D head size, P rows of the rotary table, W columns of the block table.
"""

from dataclasses import dataclass

import numba
import numpy as np
import torch
from llvmlite.binding import get_host_cpu_features
from torch import Tensor

from vllm_spindle.kernels.decode_rows import DeviceRows
from vllm_spindle.kernels.numba_decode import attend_parallel, attend_serial
from vllm_spindle.kernels.numba_softmax import LOG2_E

HAS_BF16_PRODUCTS = bool(get_host_cpu_features().get("avx512bf16"))
MAX_LANES = 8  # query heads of one pass: their sums must stay in registers


@dataclass(frozen=True, slots=True)
class DecodeRows:
    """The rows of one decode step, as int32 arrays.

    Attributes:
        block_table: block ids; prefix, region and tail of a row are runs of its columns. [B, W].
        starts: first column of the region and of the tail. [B, 2].
        shapes: key entries, value entries and tokens of the region; 0 tokens for none, NOT_MINE
            for a row to leave alone. [B, 3].
        tail_lens: dense tokens, the query tokens included: they are the last of them. [B].
        query_start: first query token of each row, and their number. [B + 1].
        prefix_blocks: columns, from the first on, of dense tokens before the region. [B].
    """

    block_table: np.ndarray
    starts: np.ndarray
    shapes: np.ndarray
    tail_lens: np.ndarray
    query_start: np.ndarray
    prefix_blocks: np.ndarray

    @classmethod
    def of(
        cls, block_table, starts, shapes, tail_lens, query_start, prefix_blocks=None
    ) -> "DecodeRows":
        """From anything that NumPy takes, CPU tensors included; no prefix if not said."""
        prefix_blocks = np.zeros(len(tail_lens)) if prefix_blocks is None else prefix_blocks
        arrays = (block_table, starts, shapes, tail_lens, query_start, prefix_blocks)
        return cls(*(np.ascontiguousarray(array, dtype=np.int32) for array in arrays))

    @classmethod
    def from_device(cls, rows: DeviceRows) -> "DecodeRows":
        """The same memory, if it is a CPU's."""
        return cls.of(
            rows.block_table,
            rows.starts,
            rows.shapes,
            rows.tail_lens,
            rows.query_start,
            rows.prefix_blocks,
        )


class RegionDecoder:
    """The kernel with what does not change from step to step."""

    def __init__(
        self,
        cos_sin: Tensor,
        scale: float,
        key_index: Tensor | None = None,
        value_index: Tensor | None = None,
        num_threads: int = 1,
    ) -> None:
        """Prepare; nothing is compiled before the first call.

        Args:
            cos_sin: the model's rotary table, cosines then sines. [P, D].
            scale: softmax scale.
            key_index: offset of each (token, dim) of the keys in a block's chunk [n, D], where
                blocks are not packed as ``keys [D, n], values [n, D]`` (vLLM's ``vec``).
            value_index: the same for the values.
            num_threads: 1 for the calling thread alone.

        Raises:
            ValueError: if the head size is not a multiple of 16.
        """
        head_size = cos_sin.shape[1]
        if head_size % 16:
            raise ValueError(f"head_size must be a multiple of 16, got {head_size}")
        self._dims = (0,) * (head_size // 16)
        self._cos_sin = turning_table(cos_sin)
        self._scale = np.float32(scale) * LOG2_E
        none = np.empty((0, 0), np.int32)
        self._key_index = none if key_index is None else key_index.to(torch.int32).numpy()
        self._value_index = none if value_index is None else value_index.to(torch.int32).numpy()
        self._num_threads = num_threads

    def __call__(
        self, query: Tensor, output: Tensor, kv_cache: Tensor, rows: DecodeRows | DeviceRows
    ) -> None:
        """Attend; the outputs go to ``output``.

        Args:
            query: rotated queries. [Q, K * G, D], bf16.
            output: [Q, K * G, D], bf16.
            kv_cache: [blocks, K, n, 2 * D], bf16, contiguous, n a multiple of 16.
            rows: the step.
        """
        if isinstance(rows, DeviceRows):
            rows = DecodeRows.from_device(rows)
        arguments = (
            self._dims,
            (0,) * num_lanes(query.shape[1] // kv_cache.shape[1]),
            _bits(query.contiguous()),
            _bits(output),
            _bits(kv_cache).reshape(*kv_cache.shape[:2], -1),
            self._cos_sin,
            rows.block_table,
            rows.starts,
            rows.shapes,
            rows.tail_lens,
            rows.query_start,
            rows.prefix_blocks,
            self._key_index,
            self._value_index,
            self._scale,
        )
        if self._num_threads == 1:
            attend_serial(*arguments)
        else:
            numba.set_num_threads(min(self._num_threads, numba.config.NUMBA_NUM_THREADS))
            attend_parallel(*arguments)


def turning_table(cos_sin: Tensor) -> np.ndarray:
    """The rotary table as the kernel reads it, flat: see ``numba_vector.rotate_and_dot``.

    Pairs of bf16 where nothing is lost by it, as vLLM's own table of a bf16 model, and the
    processor multiplies such pairs; else float32.
    """
    rounded = cos_sin.bfloat16()
    if cos_sin.shape[1] % 32 or not HAS_BF16_PRODUCTS or (rounded.float() != cos_sin).any():
        return cos_sin.float().contiguous().numpy().reshape(-1)
    pairs = torch.stack(rounded.chunk(2, dim=1), dim=-1)
    return pairs.contiguous().view(torch.uint16).numpy().reshape(-1)


def num_lanes(group: int) -> int:
    """Query heads of one pass, so that G heads take few passes with few idle lanes: 12 -> 6."""
    passes = -(-group // MAX_LANES)
    return -(-group // passes)


def _bits(tensor: Tensor) -> np.ndarray:
    if tensor.dtype != torch.bfloat16 or not tensor.is_contiguous():
        raise ValueError(f"a contiguous bfloat16 tensor is needed, got {tensor.dtype}")
    return tensor.view(torch.uint16).numpy()

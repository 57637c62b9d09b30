"""Attention that a prompt's tokens receive, on a GPU: launches ``triton_scoring``.

Shapes: K kv heads, G query heads per kv head, Q observed queries, T tokens, D head size, n tokens
per block, S splits.

No call waits for the device or looks at what is on it.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vllm_spindle.core.scoring import MIN_DISTANCE, Questions
from vllm_spindle.kernels.triton_scoring import log_sum_exps, merge_log_sum_exps, receive

LOG2_E = 1.4426950408889634
MAX_SPLITS = 64
PROGRAMS_PER_MULTIPROCESSOR = 4  # two have room, and those of early queries end early
MERGED_ROWS = 128
# Rows of the tile that stays in a program, and of those that pass by, up to so many bytes a row.
MANY, FEW, WIDEST_ROW = 128, 64, 256
INTERPRETED = ("cpu",)  # devices, by an interpreter that multiplies the bits of bfloat16
LAUNCH = {"num_warps": 4, "num_stages": 3}


@dataclass(frozen=True)
class PagedKeys:
    """Keys of one prompt in one layer, where vLLM has put them.

    Attributes:
        kv_cache: the last axis contiguous, a token's key at its beginning. [blocks, K, n, 2 * D].
        block_ids: int64. [at least the blocks of T tokens].
        num_tokens: T.
    """

    kv_cache: Tensor
    block_ids: Tensor
    num_tokens: int

    def answer(
        self, queries: Tensor, positions: Tensor, scale: float, questions: Questions
    ) -> tuple[Tensor, ...]:
        """As ``core.scoring.CachedKeys`` has it; ``positions`` on the device."""
        return DeviceAttention(queries, self, positions, scale).answer(questions)


class DeviceAttention:
    """What a prompt's tokens receive from its observed queries."""

    def __init__(
        self,
        queries: Tensor,
        keys: PagedKeys | Tensor,
        positions: Tensor,
        scale: float,
        *,
        num_splits: int | None = None,
    ) -> None:
        """The first pass, over all of the queries.

        Args:
            queries: rotated, the last axis contiguous. [K, G, Q, D].
            keys: in the cache; or a tensor, [K, T, D], the last axis contiguous.
            positions: of the queries, ascending, on the device. [Q], int64.
            scale: softmax scale, positive.
            num_splits: programs to share the tokens; None for as many as fill the device.

        Raises:
            ValueError: if the tensors do not fit one another.
        """
        self._queries, self._positions, self._scale_log2 = queries, positions, scale * LOG2_E
        self._is_paged = isinstance(keys, PagedKeys)
        if isinstance(keys, PagedKeys):
            self._keys, self._table = keys.kv_cache, keys.block_ids
            self._num_tokens, self._block_size = keys.num_tokens, keys.kv_cache.shape[2]
            self._strides = keys.kv_cache.stride()[:3]
        else:
            self._keys, self._table = keys, positions
            self._num_tokens, self._block_size = keys.shape[1], 1
            self._strides = (0, *keys.stride()[:2])
        self._check(scale)
        num_kv_heads, group, num_queries, head_size = queries.shape
        # The wider its rows, the fewer fit a multiprocessor's shared memory: 256 bytes, 512, 1024.
        rows_less = max(1, queries.element_size() * _power_of_two(head_size) // WIDEST_ROW)
        self._many, self._few = MANY // rows_less, FEW // rows_less
        num_blocks = -(-num_queries * group // self._many)
        if num_splits is None:
            num_splits = self._choose_splits(num_blocks * num_kv_heads)
        shape = (num_splits, num_kv_heads, group, num_queries)
        split_lse = torch.empty(shape, dtype=torch.float32, device=queries.device)
        log_sum_exps[(num_blocks, num_kv_heads, num_splits)](
            split_lse, queries, self._keys, self._table, positions,
            self._scale_log2, num_queries, self._num_tokens,
            *queries.stride()[:3], *self._strides,
            NUM_ROWS=self._many, TILE=self._few, **self._shape(), **LAUNCH,
        )  # fmt: skip
        self._lse = split_lse[0]
        if num_splits > 1:
            num_rows = self._lse.numel()
            self._lse = torch.empty_like(self._lse)
            merge_log_sum_exps[(-(-num_rows // MERGED_ROWS),)](
                self._lse, split_lse, num_rows, num_splits, NUM_ROWS=MERGED_ROWS
            )

    def answer(self, questions: Questions) -> tuple[Tensor, ...]:
        """The second pass: ``core.scoring.answer``. Each [K, G, T], float32."""
        num_kv_heads, group, num_queries, _ = self._queries.shape
        shape = (questions.num_maps, num_kv_heads, group, self._num_tokens)
        received = torch.empty(shape, dtype=torch.float32, device=self._queries.device)
        window, last_first = questions.window, questions.last_first
        receive[(-(-self._num_tokens // self._many), num_kv_heads * group)](
            received, self._lse, self._queries, self._keys, self._table, self._positions,
            self._scale_log2, num_queries, window.start, window.stop,
            num_queries if last_first is None else last_first, self._num_tokens,
            *self._queries.stride()[:3], *self._strides,
            TILE=self._many, NUM_QUERIES=self._few, MIN_DISTANCE=MIN_DISTANCE,
            HAS_LAST=last_first is not None, FROM_AFAR=questions.from_afar,
            **self._shape(), **LAUNCH,
        )  # fmt: skip
        return received.unbind()

    def _shape(self) -> dict[str, Any]:
        """Constants that both passes share."""
        head_size = self._queries.shape[3]
        return {
            "GROUP": self._queries.shape[1],
            "IS_PAGED": self._is_paged,
            "N": self._block_size,
            "D": head_size,
            "HEAD_PAD": _power_of_two(head_size),
            "IS_WIDENED": self._queries.device.type in INTERPRETED,
        }

    def _choose_splits(self, num_programs: int) -> int:
        """Splits that give every multiprocessor a few programs; 1 where the interpreter runs."""
        if self._queries.device.type != "cuda":
            return 1
        properties = torch.cuda.get_device_properties(self._queries.device)
        wanted = PROGRAMS_PER_MULTIPROCESSOR * properties.multi_processor_count
        return min(MAX_SPLITS, -(-wanted // num_programs))

    def _check(self, scale: float) -> None:
        queries, keys = self._queries, self._keys
        num_kv_heads, _, num_queries, head_size = queries.shape
        width = 2 * head_size if self._is_paged else head_size
        if queries.dtype != keys.dtype:
            raise ValueError(f"queries and keys must be alike, got {queries.dtype}, {keys.dtype}")
        if keys.shape[-3 if self._is_paged else 0] != num_kv_heads or keys.shape[-1] != width:
            raise ValueError(
                f"queries {tuple(queries.shape)} do not fit keys {tuple(keys.shape)}"
                f"{' of a cache' if self._is_paged else ''}"
            )
        if not 16 <= head_size <= 256 or scale <= 0:
            raise ValueError(f"head_size must be from 16 to 256, got {head_size}; scale {scale}")
        if len(self._positions) != num_queries:
            raise ValueError(f"{num_queries} queries at {len(self._positions)} positions")
        if self._is_paged and len(self._table) * self._block_size < self._num_tokens:
            raise ValueError(
                f"{self._num_tokens} tokens in {len(self._table)} blocks of {self._block_size}"
            )
        if queries.stride(-1) != 1 or keys.stride(-1) != 1:
            raise ValueError("the last axis of queries and keys must be contiguous")


def _power_of_two(number: int) -> int:
    """The next one from the number on: 12 -> 16."""
    return 1 << (number - 1).bit_length()

"""A backend around the user's backend: the stock kernel on shifted block tables.

``wrap_backend`` subclasses whichever attention backend vLLM selected. Its metadata builder hands
the stock builder each row's held blocks only, and its implementation sets the window's queries
aside; everything else, kernels included, stays stock.
"""

import copy
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from vllm.model_executor.models.utils import extract_layer_index
from vllm.v1.attention.backend import AttentionBackend, CommonAttentionMetadata

from vllm_spindle.engine.active import active_reduction
from vllm_spindle.engine.spec import SpindleSpec
from vllm_spindle.engine.step import BandRows


class ShiftedTables:
    """Persistent buffers for a band's block table and lengths, rewritten every step.

    Persistent because a captured graph reads them again by address; one pair per copy of the
    reduced region, since the copies of a step are alive together.
    """

    def __init__(self, num_copies: int) -> None:
        self._tables: list[Tensor | None] = [None] * num_copies
        self._lengths: list[Tensor | None] = [None] * num_copies

    def shift(
        self, common: CommonAttentionMetadata, rows: BandRows, block_size: int, copy_idx: int
    ) -> CommonAttentionMetadata:
        """The step's metadata with every reduced row starting at its held blocks.

        Row [- - - R R T T], copy_blocks 2, tail_block 5 -> [R R T T . . .], length 3 blocks less.
        """
        table = common.block_table_tensor
        num_rows, num_columns = len(rows.first_block), table.shape[1]
        out_table = self._buffer(self._tables, copy_idx, table)[: table.shape[0]]
        out_lengths = self._buffer(self._lengths, copy_idx, common.seq_lens)[: table.shape[0]]

        column = torch.arange(num_columns, device=table.device)
        in_region = column < rows.copy_blocks.unsqueeze(1)
        start = rows.first_block + copy_idx * rows.copy_blocks
        skipped = rows.tail_block - rows.copy_blocks
        source = column + torch.where(in_region, start.unsqueeze(1), skipped.unsqueeze(1))
        # Columns past a row's end are never read; they only must stay inside the table.
        source.clamp_(max=num_columns - 1)
        out_table[num_rows:] = table[num_rows:]
        torch.gather(table[:num_rows], 1, source, out=out_table[:num_rows])

        out_lengths.copy_(common.seq_lens)
        out_lengths[:num_rows] -= skipped.to(out_lengths.dtype) * block_size
        return common.replace(
            block_table_tensor=out_table,
            seq_lens=out_lengths,
            seq_lens_cpu_upper_bound=None,
            _num_computed_tokens_cache=None,
        )

    @staticmethod
    def _buffer(buffers: list[Tensor | None], index: int, like: Tensor) -> Tensor:
        buffer = buffers[index]
        if buffer is None or buffer.shape[0] < like.shape[0] or buffer.shape[1:] != like.shape[1:]:
            buffer = buffers[index] = torch.empty_like(like)
        return buffer


@dataclass(frozen=True)
class UnfoldMetadata:
    """``gqa: unfold``: the stock metadata of each query head of a group, in head order."""

    per_query_head: tuple[Any, ...]
    num_actual_tokens: int


class SpindleBuilderMixin:
    """Builds the stock metadata from shifted tables."""

    # vLLM may otherwise reuse the first band's lengths for the others.
    supports_update_block_table = False

    def __init__(self, kv_cache_spec: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(kv_cache_spec, *args, **kwargs)
        assert isinstance(kv_cache_spec, SpindleSpec)
        policy = kv_cache_spec.policy
        self._band = kv_cache_spec.band
        self._is_unfold = policy.config.gqa == "unfold"
        self._num_copies = policy.num_queries_per_kv if self._is_unfold else 1
        self._shifted = ShiftedTables(self._num_copies)

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> Any:
        reduction = active_reduction()
        rows = reduction.step.bands[self._band] if reduction is not None else None
        if rows is None:
            return super().build(common_prefix_len, common_attn_metadata, fast_build)
        block_size = self.kv_cache_spec.block_size
        shifted = [
            self._shifted.shift(common_attn_metadata, rows, block_size, copy_idx)
            for copy_idx in range(self._num_copies)
        ]
        if not self._is_unfold:
            return super().build(common_prefix_len, shifted[0], fast_build)
        # One query head per kv head at a time, each over the copy that it chose.
        per_head = copy.copy(self)
        per_head.num_heads = self.num_kv_heads
        stock_build = super(SpindleBuilderMixin, per_head).build
        return UnfoldMetadata(
            tuple(stock_build(common_prefix_len, each, fast_build) for each in shifted),
            common_attn_metadata.num_actual_tokens,
        )


class SpindleImplMixin:
    """Runs the stock implementation and sets the window's queries aside."""

    def forward(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: Any,
        output: Tensor,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        reduction = active_reduction()
        if reduction is not None and reduction.step.window is not None:
            window = reduction.step.window
            layer_idx = extract_layer_index(layer.layer_name)
            reduction.stash.record(layer_idx, query, window.source, window.target)
        if not isinstance(attn_metadata, UnfoldMetadata):
            return super().forward(
                layer, query, key, value, kv_cache, attn_metadata, output, *args, **kwargs
            )
        group = len(attn_metadata.per_query_head)
        for head, metadata in enumerate(attn_metadata.per_query_head):
            head_query = query[:, head::group].contiguous()
            head_output = torch.empty_like(head_query)
            super().forward(
                layer, head_query, key, value, kv_cache, metadata, head_output, *args, **kwargs
            )
            output[:, head::group] = head_output
        return output


@lru_cache(maxsize=16)
def wrap_backend(stock: type[AttentionBackend]) -> type[AttentionBackend]:
    """The Spindle backend around a stock one; the same class for the same backend."""
    impl = type(f"Spindle{stock.get_impl_cls().__name__}", (SpindleImplMixin, stock.get_impl_cls()), {})
    builder = type(
        f"Spindle{stock.get_builder_cls().__name__}",
        (SpindleBuilderMixin, stock.get_builder_cls()),
        {},
    )
    return type(
        f"Spindle{stock.__name__}",
        (stock,),
        {
            "__module__": __name__,
            "get_impl_cls": staticmethod(lambda: impl),
            "get_builder_cls": staticmethod(lambda: builder),
        },
    )

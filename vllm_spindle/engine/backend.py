"""A backend around the user's backend: the stock kernel on shifted block tables.

``wrap_backend`` subclasses whichever attention backend vLLM selected. Its metadata builder hands
the stock builder each row's held blocks only, and its implementation sets the window's queries
aside; everything else, kernels included, stays stock.
"""

import copy
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from vllm.model_executor.models.utils import extract_layer_index
from vllm.v1.attention.backend import AttentionBackend, CommonAttentionMetadata

from vllm_spindle.engine.active import active_reduction
from vllm_spindle.engine.spec import SpindleSpec
from vllm_spindle.engine.step import BandRows, CodebookRows

if TYPE_CHECKING:
    from vllm_spindle.kernels.decode import DecodeRows, RegionDecoder


class ShiftedTable:
    """A band's block table and lengths as the stock kernel shall see them, rewritten every step.

    The buffers are persistent, because a captured graph reads them again by address. Each copy
    of the reduced region has its own, since the copies of a step are alive together.
    """

    def __init__(self, copy_idx: int, block_size: int) -> None:
        self._copy_idx = copy_idx
        self._block_size = block_size
        self._table: Tensor | None = None
        self._lengths: Tensor | None = None
        self._rows: BandRows | None = None
        self._source = self._skipped_tokens = torch.empty(0)

    def shift(self, common: CommonAttentionMetadata, rows: BandRows) -> CommonAttentionMetadata:
        """The step's metadata with every reduced row starting at its held blocks."""
        table, lengths = common.block_table_tensor, common.seq_lens
        if rows is not self._rows:
            self._rows = rows
            self._source = rows.source_columns(self._copy_idx, table.shape[1]).to(table.device)
            skipped = rows.skipped_blocks * self._block_size
            self._skipped_tokens = skipped.to(lengths.device, lengths.dtype)
        num_rows = len(self._source)
        self._table = _at_least(self._table, table)
        self._lengths = _at_least(self._lengths, lengths)
        out_table, out_lengths = self._table[: len(table)], self._lengths[: len(lengths)]
        torch.gather(table[:num_rows], 1, self._source, out=out_table[:num_rows])
        torch.sub(lengths[:num_rows], self._skipped_tokens, out=out_lengths[:num_rows])
        if num_rows < len(table):  # rows of padding
            out_table[num_rows:] = table[num_rows:]
            out_lengths[num_rows:] = lengths[num_rows:]
        return common.replace(
            block_table_tensor=out_table,
            seq_lens=out_lengths,
            seq_lens_cpu_upper_bound=None,
            _num_computed_tokens_cache=None,
        )


def _at_least(buffer: Tensor | None, like: Tensor) -> Tensor:
    """The buffer, or a larger one if it has too few rows for ``like``."""
    if buffer is None or len(buffer) < len(like) or buffer.shape[1:] != like.shape[1:]:
        return torch.empty_like(like)
    return buffer


@dataclass(frozen=True)
class UnfoldMetadata:
    """``gqa: unfold``: the stock metadata of each query head of a group, in head order."""

    per_query_head: tuple[Any, ...]
    num_actual_tokens: int


@dataclass(frozen=True)
class CodebookMetadata:
    """A band with codebooks: the compiled kernel's rows, and the stock kernel's if it has any.

    Attributes:
        stock: metadata of the whole batch, reduced rows with their tail alone; None if every row
            is reduced. What the stock kernel writes for reduced rows is overwritten.
        rows: the reduced rows.
        tokens: their query tokens; None for all of them. int64.
    """

    stock: Any
    rows: "DecodeRows"
    tokens: Tensor | None
    num_actual_tokens: int


def codebook_rows(
    common: CommonAttentionMetadata, codebooks: CodebookRows, block_size: int
) -> tuple["DecodeRows", Tensor | None]:
    """The kernel's view of the reduced rows, and their query tokens (None for all)."""
    # Not before vLLM has started: its kernel registration trips over numba's modules.
    from vllm_spindle.kernels.decode import DecodeRows

    rows, table, lengths = codebooks.rows, common.block_table_tensor, common.seq_lens
    starts = common.query_start_loc_cpu
    if len(rows) == common.num_reqs:
        tokens, query_start = None, starts
    else:
        table, lengths = table[rows], lengths[rows]
        counts = starts[rows + 1] - starts[rows]
        query_start = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
        tokens = torch.cat(
            [torch.arange(int(starts[row]), int(starts[row + 1])) for row in rows.tolist()]
        )
    tail_lens = lengths - codebooks.starts[:, 1] * block_size
    decode_rows = DecodeRows.of(
        table,
        codebooks.starts,
        codebooks.shapes,
        tail_lens,
        query_start,
        codebooks.prefix_blocks,
    )
    return decode_rows, tokens


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
        num_copies = policy.num_queries_per_kv if self._is_unfold else 1
        self._tables = [ShiftedTable(i, kv_cache_spec.block_size) for i in range(num_copies)]

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
        shifted = [table.shift(common_attn_metadata, rows) for table in self._tables]
        codebooks = reduction.step.codebooks[self._band]
        if codebooks is not None:
            decode_rows, tokens = codebook_rows(
                common_attn_metadata, codebooks, self.kv_cache_spec.block_size
            )
            stock = None
            if tokens is not None:
                stock = super().build(common_prefix_len, shifted[0], fast_build)
            return CodebookMetadata(
                stock, decode_rows, tokens, common_attn_metadata.num_actual_tokens
            )
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
        if reduction is not None:
            reduction.stash.record(extract_layer_index(layer.layer_name), query)
        if isinstance(attn_metadata, CodebookMetadata):
            if attn_metadata.stock is not None:
                super().forward(
                    layer, query, key, value, kv_cache, attn_metadata.stock, output, *args, **kwargs
                )
            decoder = reduction.decoder(extract_layer_index(layer.layer_name))
            return _attend_codebooks(decoder, query, kv_cache, attn_metadata, output)
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


def _attend_codebooks(
    decoder: "RegionDecoder",
    query: Tensor,
    kv_cache: Tensor,
    metadata: CodebookMetadata,
    output: Tensor,
) -> Tensor:
    tokens, num_tokens = metadata.tokens, metadata.num_actual_tokens
    if tokens is None:
        decoder(query[:num_tokens].contiguous(), output[:num_tokens], kv_cache, metadata.rows)
        return output
    row_output = torch.empty(len(tokens), *output.shape[1:], dtype=output.dtype)
    decoder(query.index_select(0, tokens), row_output, kv_cache, metadata.rows)
    output.index_copy_(0, tokens, row_output)
    return output


@lru_cache(maxsize=16)
def wrap_backend(stock: type[AttentionBackend]) -> type[AttentionBackend]:
    """The Spindle backend around a stock one; the same class for the same backend."""
    stock_impl, stock_builder = stock.get_impl_cls(), stock.get_builder_cls()
    impl = type(f"Spindle{stock_impl.__name__}", (SpindleImplMixin, stock_impl), {})
    builder = type(f"Spindle{stock_builder.__name__}", (SpindleBuilderMixin, stock_builder), {})
    return type(
        f"Spindle{stock.__name__}",
        (stock,),
        {
            "__module__": __name__,
            "get_impl_cls": staticmethod(lambda: impl),
            "get_builder_cls": staticmethod(lambda: builder),
        },
    )

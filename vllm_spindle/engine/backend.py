"""A backend around the user's backend: the stock kernel on shifted block tables.

``wrap_backend`` subclasses whichever attention backend vLLM selected. Its metadata builder hands
the stock builder each row's held blocks only, and its implementation sets the window's queries
aside; everything else, kernels included, stays stock.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from vllm.config import VllmConfig
from vllm.model_executor.models.utils import extract_layer_index
from vllm.v1.attention.backend import AttentionBackend, CommonAttentionMetadata

from vllm_spindle.engine.active import active_reduction
from vllm_spindle.engine.decoders import CPU_BACKEND
from vllm_spindle.engine.graphs import may_be_captured, may_hold_prompts
from vllm_spindle.engine.head_table import HeadTable, pages
from vllm_spindle.engine.one_kv_head import for_one_kv_head
from vllm_spindle.engine.region_rows import RegionRows
from vllm_spindle.engine.shared_head_table import SharedHeadTable
from vllm_spindle.engine.shifted_table import ShiftedTable
from vllm_spindle.engine.spec import SpindleSpec
from vllm_spindle.engine.step import HeadRows
from vllm_spindle.kernels.decode_rows import DeviceRows


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
        rows: all rows; those that are not reduced are marked.
        num_actual_tokens: with padding, in a captured graph.
    """

    stock: Any
    rows: DeviceRows
    num_actual_tokens: int


@dataclass(frozen=True)
class HeadMetadata:
    """Measured budgets: per layer, the stock metadata of a batch with a row for each kv head.

    Attributes:
        of_layer: by layer index, within the layer's attention call: it may fill buffers.
        num_kv_heads: of this rank (K).
        num_actual_tokens: of the step (T); with padding, in a captured graph.
    """

    of_layer: Callable[[int], Any]
    num_kv_heads: int
    num_actual_tokens: int


class SpindleBuilderMixin:
    """Builds the stock metadata from shifted tables."""

    # vLLM may otherwise reuse the first band's lengths for the others.
    supports_update_block_table = False
    # Whether attention is Triton's or FlashAttention's, and with it what we launch.
    with_kernels = True

    def __init__(
        self,
        kv_cache_spec: Any,
        layer_names: list[str],
        vllm_config: VllmConfig,
        device: torch.device,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device, *args, **kwargs)
        assert isinstance(kv_cache_spec, SpindleSpec)
        policy = kv_cache_spec.policy
        block_size, max_rows = kv_cache_spec.block_size, vllm_config.scheduler_config.max_num_seqs
        self._band = kv_cache_spec.band
        self._is_unfold = policy.config.gqa == "unfold"
        # What is captured must be the same, whichever rows are reduced when it is replayed.
        self._may_be_captured = may_be_captured(vllm_config.compilation_config)
        self._compilation = vllm_config.compilation_config
        self._layers = policy.bands[self._band]
        self._num_kv_heads = kv_cache_spec.num_kv_heads
        self._head_tables: dict[int, HeadTable] = {}
        self._shared_head_table: SharedHeadTable | None = None
        if policy.profile is not None:
            size = self._num_kv_heads, block_size
            # vLLM's attention for CPUs plans from each layer's lengths, before the forward.
            if self._may_be_captured or device.type != "cpu":
                self._shared_head_table = SharedHeadTable(
                    len(self._layers), *size, max_rows, device, with_kernel=self.with_kernels
                )
            else:
                self._head_tables = {
                    layer_idx: HeadTable(layer, *size)
                    for layer, layer_idx in enumerate(self._layers)
                }
        num_copies = policy.num_queries_per_kv if self._is_unfold else 1
        self._tables = [ShiftedTable(i, block_size, max_rows) for i in range(num_copies)]
        self._regions: RegionRows | None = None
        if policy.method_of_band(self._band) != "evict":
            self._regions = RegionRows(block_size, max_rows, device)

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> Any:
        reduction = active_reduction()
        heads = reduction.step.heads[self._band] if reduction is not None else None
        if self._shared_head_table is not None:
            return self._build_shared_heads(self._shared_head_table, common_attn_metadata, heads)
        if self._head_tables:
            if heads is None:
                return super().build(common_prefix_len, common_attn_metadata, fast_build)
            return self._build_heads(common_attn_metadata, heads, fast_build)
        rows = reduction.step.bands[self._band] if reduction is not None else None
        if rows is None and not self._may_be_captured:
            return super().build(common_prefix_len, common_attn_metadata, fast_build)
        shifted = [table.shift(common_attn_metadata, rows) for table in self._tables]
        if self._is_unfold:
            return self._build_unfold(common_prefix_len, shifted, fast_build)
        if self._regions is None or reduction is None:
            return super().build(common_prefix_len, shifted[0], fast_build)
        codebooks = reduction.step.codebooks[self._band]
        is_all = codebooks is not None and len(codebooks.rows) == common_attn_metadata.num_reqs
        stock = None
        if self._may_be_captured or not is_all:
            stock = super().build(common_prefix_len, shifted[0], fast_build)
        return CodebookMetadata(
            stock,
            self._regions.rows(common_attn_metadata, codebooks),
            common_attn_metadata.num_actual_tokens,
        )

    def build_for_cudagraph_capture(self, common_attn_metadata: CommonAttentionMetadata) -> Any:
        """As the stock builder does it, where its metadata is what we hand out."""
        is_stock = self._regions is None and self._shared_head_table is None
        if is_stock and not self._is_unfold:
            return super().build_for_cudagraph_capture(common_attn_metadata)
        return self.build(0, common_attn_metadata)

    def _build_heads(
        self, common: CommonAttentionMetadata, rows: HeadRows, fast_build: bool
    ) -> "HeadMetadata":
        """A row for each kv head, layer by layer."""
        stock_build, apart = self._build_one_kv_head(), self._pages_apart()
        per_layer = {
            layer_idx: stock_build(0, table.split(common, rows, apart), fast_build)
            for layer_idx, table in self._head_tables.items()
        }
        return HeadMetadata(per_layer.__getitem__, self._num_kv_heads, common.num_actual_tokens)

    def _build_shared_heads(
        self, table: SharedHeadTable, common: CommonAttentionMetadata, rows: HeadRows | None
    ) -> "HeadMetadata":
        """The same metadata for every layer, over a table that each layer makes its own."""
        batch = table.batch(
            common, rows, self._pages_apart(), with_rest=may_hold_prompts(self._compilation)
        )
        # Fast: without FlashAttention 3's plan, which would be of one layer's lengths.
        stock = self._build_one_kv_head()(0, batch.split, True)

        def of_layer(layer_idx: int) -> Any:
            batch.fill(self._layers.index(layer_idx))
            return stock

        return HeadMetadata(of_layer, self._num_kv_heads, common.num_actual_tokens)

    def _build_one_kv_head(self) -> Callable[..., Any]:
        """The stock builder's ``build``, for rows of one kv head."""
        single = for_one_kv_head(self, self._num_kv_heads)
        build: Callable[..., Any] = super(SpindleBuilderMixin, single).build
        return build

    def _pages_apart(self) -> int:
        """In the caches of this band's layers, which are laid out alike."""
        layer = self._compilation.static_forward_context[self.layer_names[0]]
        return pages(layer.kv_cache)[1]

    def _build_unfold(
        self, common_prefix_len: int, shifted: list[CommonAttentionMetadata], fast_build: bool
    ) -> "UnfoldMetadata":
        """One query head per kv head at a time, each over the copy that it chose."""
        per_head = copy.copy(self)
        per_head.num_heads = self.num_kv_heads
        stock_build = super(SpindleBuilderMixin, per_head).build
        return UnfoldMetadata(
            tuple(stock_build(common_prefix_len, each, fast_build) for each in shifted),
            shifted[0].num_actual_tokens,
        )


class SpindleImplMixin:
    """Runs the stock implementation and sets the window's queries aside."""

    _single: Any = None

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
            num_tokens = attn_metadata.num_actual_tokens
            decoder(query[:num_tokens], output[:num_tokens], kv_cache, attn_metadata.rows)
            return output
        if isinstance(attn_metadata, HeadMetadata):
            metadata = attn_metadata.of_layer(extract_layer_index(layer.layer_name))
            num_tokens, num_heads = attn_metadata.num_actual_tokens, attn_metadata.num_kv_heads
            # [T, K * G, D] -> [K * T, G, D], kv head after kv head.
            by_head = query[:num_tokens].unflatten(1, (num_heads, -1)).transpose(0, 1)
            head_output = torch.empty(by_head.shape, dtype=query.dtype, device=query.device)
            super(SpindleImplMixin, self._one_kv_head(num_heads)).forward(
                layer,
                by_head.flatten(0, 1).contiguous(),
                key,
                value,
                pages(kv_cache)[0],
                metadata,
                head_output.flatten(0, 1),
                *args,
                **kwargs,
            )
            output[:num_tokens] = head_output.transpose(0, 1).flatten(1, 2)
            return output
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

    def fused_output_quant_supported(self, quant_key: Any) -> bool:
        """No: the compiled kernel over codebooks writes outputs as they are, in the same tensor."""
        return False

    def _one_kv_head(self, num_kv_heads: int) -> Any:
        """The implementation for rows of one kv head; the same one in every call."""
        if self._single is None:
            self._single = for_one_kv_head(self, num_kv_heads)
        return self._single


@lru_cache(maxsize=16)
def wrap_backend(stock: type[AttentionBackend]) -> type[AttentionBackend]:
    """The Spindle backend around a stock one; the same class for the same backend."""
    stock_impl, stock_builder = stock.get_impl_cls(), stock.get_builder_cls()
    impl = type(f"Spindle{stock_impl.__name__}", (SpindleImplMixin, stock_impl), {})
    builder = type(
        f"Spindle{stock_builder.__name__}",
        (SpindleBuilderMixin, stock_builder),
        {"with_kernels": stock.get_name() != CPU_BACKEND},
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

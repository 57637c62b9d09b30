"""What a band's reduced region holds: kept tokens as they are, or codebooks.

Shapes: K kv heads, G query heads per kv head, W window queries, T prompt tokens, C context
tokens, N tokens kept, D head size.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from vllm_spindle.core.budget import BandPlan
from vllm_spindle.core.choice import ChoiceRule, choose_kept
from vllm_spindle.core.codebook import Codebook
from vllm_spindle.core.eviction import gather_kept
from vllm_spindle.core.rotary import unrotate_keys
from vllm_spindle.engine.codebook_shape import codebook_shape
from vllm_spindle.kernels.region import pack_region
from vllm_spindle.kernels.region_shape import RegionShape
from vllm_spindle.policy import SpindlePolicy


@dataclass(frozen=True)
class ReducedLayer:
    """One attention layer of a band, as the reduction needs it.

    Attributes:
        layer_idx: depth in the model.
        kv_cache: the layer's cache. [B, K, N, 2 * D].
        scale: softmax scale.
        write: vLLM's own cache write for this layer.
        cos_sin: the model's rotary table, [P, D]; None where no codebook needs it.
    """

    layer_idx: int
    kv_cache: Tensor
    scale: float
    write: Callable[[Tensor, Tensor, Tensor, Tensor], None]
    cos_sin: Tensor | None = None


@dataclass(frozen=True)
class LayerPrompt:
    """An ended prompt in one layer.

    Attributes:
        queries: rotated queries of the last W tokens. [K, G, W, D].
        keys: rotated keys of T tokens and the rest of their last block. [K, T.., D].
        values: [K, T.., D].
        prompt_len: T.
        rule: how the layer chooses.
    """

    queries: Tensor
    keys: Tensor
    values: Tensor
    prompt_len: int
    rule: ChoiceRule

    def choose(self, scale: float, num_context: int, num_kept: int) -> Tensor:
        """Context positions to keep."""
        return choose_kept(
            self.rule,
            self.queries,
            self.keys[:, : self.prompt_len],
            scale=scale,
            num_context=num_context,
            num_kept=num_kept,
        )


@dataclass
class CodebookStats:
    """Vectors and entries of the codebooks built since the last report, over heads and layers."""

    vectors: int = 0
    entries: int = 0
    capacity: int = 0
    overflow: int = 0
    similarity_sum: float = 0.0


class Region(Protocol):
    """A way to fill the reduced region of a band."""

    def tokens_kept(self, plan: BandPlan) -> int:
        """Context tokens that stay visible, per kv head (``unfold``: per query head)."""

    def fill(
        self, layer: ReducedLayer, prompt: LayerPrompt, plan: BandPlan, region: Tensor
    ) -> None:
        """Reduce one layer into the region's blocks. region: block ids, [R]."""


class DenseRegion:
    """Eviction: chosen tokens, as they are, in ordinary rows of the cache."""

    def __init__(self, policy: SpindlePolicy) -> None:
        self._block_size = policy.block_size
        self._num_copies = policy.num_queries_per_kv if policy.config.gqa == "unfold" else 1

    def tokens_kept(self, plan: BandPlan) -> int:
        return plan.reduced_blocks * self._block_size // self._num_copies

    def fill(
        self, layer: ReducedLayer, prompt: LayerPrompt, plan: BandPlan, region: Tensor
    ) -> None:
        num_context = plan.tail_block * self._block_size
        kept = prompt.choose(layer.scale, num_context, self.tokens_kept(plan))
        slots = (region.unsqueeze(1) * self._block_size + torch.arange(self._block_size)).flatten()
        copies = kept.unbind(1) if kept.dim() == 3 else (kept,)
        for copy, copy_slots in zip(copies, slots.chunk(len(copies)), strict=True):
            if len(copy_slots):
                layer.write(
                    gather_kept(prompt.keys, copy).transpose(0, 1).contiguous(),
                    gather_kept(prompt.values, copy).transpose(0, 1).contiguous(),
                    layer.kv_cache,
                    copy_slots,
                )


@dataclass
class CodebookRegion:
    """Merging: entries, codes, norms and positions; under ``both`` of chosen tokens only."""

    policy: SpindlePolicy
    method: str
    head_size: int
    stats: CodebookStats = field(default_factory=CodebookStats)

    def shape(self, plan: BandPlan) -> RegionShape:
        """Tokens and entries of the region, per kv head."""
        return codebook_shape(
            self.policy.config, self.method, plan, self.policy.block_size, self.head_size
        )

    def tokens_kept(self, plan: BandPlan) -> int:
        return self.shape(plan).num_tokens

    def fill(
        self, layer: ReducedLayer, prompt: LayerPrompt, plan: BandPlan, region: Tensor
    ) -> None:
        shape = self.shape(plan)
        if shape.num_tokens == 0:
            return
        num_context = plan.tail_block * self.policy.block_size
        num_kv_heads = prompt.keys.shape[0]
        if shape.num_tokens == num_context:
            positions = torch.arange(num_context).expand(num_kv_heads, -1)
        else:
            positions = prompt.choose(layer.scale, num_context, shape.num_tokens)
        assert layer.cos_sin is not None
        keys = unrotate_keys(gather_kept(prompt.keys, positions), positions, layer.cos_sin)
        values = gather_kept(prompt.values, positions).float()
        config = self.policy.config
        key_books = self._cover(keys, config.theta_key, shape.num_key_entries)
        value_books = self._cover(values, config.theta_value, shape.num_value_entries)
        pack_region(layer.kv_cache, region, shape, key_books, value_books, positions)
        for books, capacity in (
            (key_books, shape.num_key_entries),
            (value_books, shape.num_value_entries),
        ):
            self._count(books, capacity)

    @staticmethod
    def _cover(vectors: Tensor, threshold: float, capacity: int) -> tuple[Codebook, ...]:
        # Not before vLLM has started: its kernel registration trips over numba's modules.
        from vllm_spindle.kernels.numba_cover import cover_layer

        return cover_layer(vectors, threshold, capacity)

    def _count(self, books: tuple[Codebook, ...], capacity: int) -> None:
        for book in books:
            self.stats.vectors += len(book.codes)
            self.stats.entries += len(book.entries)
            self.stats.capacity += capacity
            self.stats.overflow += book.num_overflow
            self.stats.similarity_sum += float(book.similarity.sum())


def make_region(policy: SpindlePolicy, band: int, head_size: int) -> Region:
    """The region of a band, by its method."""
    method = policy.method_of_band(band)
    return DenseRegion(policy) if method == "evict" else CodebookRegion(policy, method, head_size)

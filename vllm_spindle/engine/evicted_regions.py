"""Regions of bands that evict: chosen tokens, as they are.

Shapes: L layers, K kv heads, G query heads per kv head, N tokens kept.
"""

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from vllm_spindle.core.choice import rank_maps, stack_maps
from vllm_spindle.core.ordering import ascending
from vllm_spindle.engine.layer_reduction import LayerReduction
from vllm_spindle.policy import SpindlePolicy


class EvictedRegion(Protocol):
    """How a band's layers share a region out, and fill it."""

    def counts(self, work: LayerReduction) -> list[int]:
        """Tokens that each row of a layer's ranking keeps, in whole blocks: K, or K * G."""

    def keep(self, work: LayerReduction, kept: Tensor) -> None:
        """Fill the region. kept: positions, ascending, row after row. [sum of counts]."""


class DenseRegion:
    """In ordinary rows of the cache: of every kv head as many."""

    def __init__(self, policy: SpindlePolicy) -> None:
        self._num_copies = policy.num_queries_per_kv if policy.config.gqa == "unfold" else 1

    def counts(self, work: LayerReduction) -> list[int]:
        """The region's tokens for each kv head; with ``unfold`` a copy's for each query head."""
        num_kv_heads, block_size = work.layer.kv_cache.shape[1:3]
        num_kept = work.plan.reduced_blocks * block_size // self._num_copies
        return [num_kept] * (num_kv_heads * self._num_copies)

    def keep(self, work: LayerReduction, kept: Tensor) -> None:
        """As [K, N], or [K, G, N]."""
        shape = (self._num_copies,) if self._num_copies > 1 else ()
        num_kv_heads = work.layer.kv_cache.shape[1]
        num_kept = len(kept) // (num_kv_heads * self._num_copies)
        work.tokens.keep(kept.view(num_kv_heads, *shape, num_kept), work.region)


class HeadRegion:
    """In pages: of each kv head of each layer as many as it has."""

    def __init__(self, policy: SpindlePolicy, heads: range) -> None:
        """Args: heads: kv heads of this rank."""
        self._policy, self._heads = policy, heads

    def counts(self, work: LayerReduction) -> list[int]:
        """By the profile."""
        blocks = self._policy.head_blocks(work.layer.layer_idx, work.plan, self._heads)
        return [count * self._policy.block_size for count in blocks]

    def keep(self, work: LayerReduction, kept: Tensor) -> None:
        """Head after head."""
        work.tokens.keep_by_head(list(kept.split(self.counts(work))), work.region)


def evict(regions: Sequence[EvictedRegion], work: Sequence[LayerReduction]) -> list[float]:
    """Reduce one prompt in some layers, of one context and one visual cap, chosen in one go.

    The dozens of small launches that a ranking takes on a GPU are so all layers', whatever their
    bands keep: who keeps less takes fewer of the same order.

    Args:
        regions: of each layer's band.
        work: the layers. [L].

    Returns:
        Tokens that stay visible in each layer, mean over kv heads (``unfold``: query heads). [L].
    """
    counts = [region.counts(each) for region, each in zip(regions, work, strict=True)]
    all_counts = [count for each in counts for count in each]
    first = work[0]
    ranked = rank_maps(
        first.rule,
        stack_maps([each.maps() for each in work]),
        num_kept=max(all_counts),
        num_protected=first.context.start,
        visual=first.visual,
    )
    kept = ascending(ranked.flatten(0, -2), all_counts, first.context.stop)
    parts = kept.split([sum(each) for each in counts])
    for region, each, own in zip(regions, work, parts, strict=True):
        region.keep(each, own)
    return [sum(each) / len(each) for each in counts]

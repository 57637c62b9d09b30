"""What a band's reduced region holds: kept tokens as they are, or codebooks.

Shapes: K kv heads, G query heads per kv head, Q observed queries, T prompt tokens, C context
tokens, N tokens kept, D head size.
"""

from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from vllm_spindle.core.admission import Admitted
from vllm_spindle.core.budget import BandPlan
from vllm_spindle.core.choice import ChoiceRule, choose_kept, keep_by_head, rank_context
from vllm_spindle.core.modality import VisualCap
from vllm_spindle.core.rotary import unrotate_keys
from vllm_spindle.core.scoring import CachedKeys
from vllm_spindle.engine.codebook_shape import codebook_shape
from vllm_spindle.engine.prompt_tokens import PromptTokens, ReducedLayer
from vllm_spindle.kernels.region import pack_region
from vllm_spindle.kernels.region_shape import RegionShape
from vllm_spindle.policy import SpindlePolicy


@dataclass(frozen=True)
class LayerPrompt:
    """An ended prompt in one layer.

    Attributes:
        queries: rotated queries of the observed tokens, and of those of the answer that were waited
            for. [K, G, Q, D].
        positions: of those, on the CPU, or where kernels score on their device. [Q], int64.
        tokens: the prompt's keys and values.
        rule: how the layer chooses.
        num_ahead: last of the queries, which are the answer's.
        visual: which tokens are visual and how many may stay; None for no difference.
    """

    queries: Tensor
    positions: Tensor
    tokens: PromptTokens
    rule: ChoiceRule
    num_ahead: int = 0
    visual: VisualCap | None = None

    def choose(self, scale: float, context: range, num_kept: int) -> Tensor:
        """Positions of the context to keep, ascending."""
        return choose_kept(*self._scored(), **self._counts(scale, context, num_kept))

    def rank(self, scale: float, context: range, num_kept: int) -> Tensor:
        """Positions of the context, the most important first."""
        return rank_context(*self._scored(), **self._counts(scale, context, num_kept))

    def _scored(self) -> tuple[ChoiceRule, Tensor, Tensor | CachedKeys, Tensor]:
        return self.rule, self.queries, self.tokens.keys, self.positions

    def _counts(self, scale: float, context: range, num_kept: int) -> dict[str, Any]:
        return {
            "scale": scale,
            "num_context": context.stop,
            "num_kept": num_kept,
            "num_protected": context.start,
            "num_ahead": self.num_ahead,
            "visual": self.visual,
        }


@dataclass
class CodebookStats:
    """Codebooks built since the last report, summed over heads and layers.

    Attributes:
        vectors: keys and values that have a code.
        entries: in use.
        capacity: entries that there was room for.
        overflow: keys and values of tokens that found no entry and no room for one.
        similarity_sum: cosines of the vectors to their entries.
    """

    vectors: int = 0
    entries: int = 0
    capacity: int = 0
    overflow: int = 0
    similarity_sum: float = 0.0


def context_tokens(plan: BandPlan, block_size: int) -> range:
    """Positions that a band may evict or merge."""
    return range(plan.prefix_blocks * block_size, plan.tail_block * block_size)


class Region(Protocol):
    """A way to fill the reduced region of a band."""

    def fill(
        self, layer: ReducedLayer, prompt: LayerPrompt, plan: BandPlan, region: Tensor
    ) -> float:
        """Reduce one layer into the region's blocks. region: block ids, [R].

        Returns:
            Context tokens that stay visible, mean over kv heads (``unfold``: query heads).
        """


class DenseRegion:
    """Eviction: chosen tokens, as they are, in ordinary rows of the cache."""

    def __init__(self, policy: SpindlePolicy) -> None:
        self._block_size = policy.block_size
        self._num_copies = policy.num_queries_per_kv if policy.config.gqa == "unfold" else 1

    def fill(
        self, layer: ReducedLayer, prompt: LayerPrompt, plan: BandPlan, region: Tensor
    ) -> float:
        num_kept = plan.reduced_blocks * self._block_size // self._num_copies
        kept = prompt.choose(layer.scale, context_tokens(plan, self._block_size), num_kept)
        prompt.tokens.keep(kept, region)
        return num_kept


class HeadRegion:
    """Eviction where each kv head of a layer has a number of pages of its own."""

    def __init__(self, policy: SpindlePolicy, heads: range) -> None:
        """Args: heads: kv heads of this rank."""
        self._policy, self._heads = policy, heads

    def fill(
        self, layer: ReducedLayer, prompt: LayerPrompt, plan: BandPlan, region: Tensor
    ) -> float:
        block_size, num_heads = self._policy.block_size, len(self._heads)
        blocks = self._policy.head_blocks(layer.layer_idx, plan, self._heads)
        counts = [count * block_size for count in blocks]
        context = context_tokens(plan, block_size)
        kept = keep_by_head(prompt.rank(layer.scale, context, max(counts)), counts)
        prompt.tokens.keep_by_head(kept, region)
        return sum(map(len, kept)) / num_heads


@dataclass
class CodebookRegion:
    """Merging: entries, codes, norms and positions of the best tokens that find an entry."""

    policy: SpindlePolicy
    method: str
    head_size: int
    stats: CodebookStats = field(default_factory=CodebookStats)

    def shape(self, plan: BandPlan) -> RegionShape:
        """Tokens and entries that the region has room for, per kv head."""
        return codebook_shape(
            self.policy.config, self.method, plan, self.policy.block_size, self.head_size
        )

    def fill(
        self, layer: ReducedLayer, prompt: LayerPrompt, plan: BandPlan, region: Tensor
    ) -> float:
        shape = self.shape(plan)
        if shape.num_tokens == 0:
            return 0
        context = context_tokens(plan, self.policy.block_size)
        assert layer.cos_sin is not None
        # Not before vLLM has started: its kernel registration trips over numba's modules.
        from vllm_spindle.kernels.cover import admit_layer

        keys, values = prompt.tokens.read()
        places = torch.arange(context.stop, device=keys.device)
        keys = unrotate_keys(keys[:, : context.stop], places, layer.cos_sin)
        # On the CPU, wherever the cache is: which token finds an entry depends on those before it.
        heads = admit_layer(
            keys.cpu(),
            values[:, : context.stop].cpu(),
            prompt.rank(layer.scale, context, len(context)).cpu(),
            (self.policy.config.theta_key, self.policy.config.theta_value),
            (shape.num_key_entries, shape.num_value_entries, shape.num_tokens),
        )
        tokens = [head.tokens for head in heads]
        key_books, value_books = [head.keys for head in heads], [head.values for head in heads]
        pack_region(layer.kv_cache, region, shape, key_books, value_books, tokens)
        for head in heads:
            self._count(head, shape)
        return sum(map(len, tokens)) / len(tokens)

    def _count(self, head: Admitted, shape: RegionShape) -> None:
        self.stats.capacity += shape.num_key_entries + shape.num_value_entries
        self.stats.overflow += 2 * head.num_refused
        for book in (head.keys, head.values):
            self.stats.vectors += len(book.codes)
            self.stats.entries += len(book.entries)
            self.stats.similarity_sum += float(book.similarity.sum())


def make_region(policy: SpindlePolicy, band: int, head_size: int, heads: range) -> Region:
    """The region of a band, by its method. heads: kv heads of this rank."""
    if policy.profile is not None:
        return HeadRegion(policy, heads)
    method = policy.method_of_band(band)
    return DenseRegion(policy) if method == "evict" else CodebookRegion(policy, method, head_size)

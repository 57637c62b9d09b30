"""Configuration plus model geometry: which band a layer is in, and the plan of a prompt.

Hashable and picklable: the engine carries it inside each band's KV-cache spec, so that the
scheduler and every worker compute the same plan.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from fractions import Fraction
from functools import cached_property, lru_cache
from typing import Any

import numpy as np

from vllm_spindle.config import MethodName, PackedShares, RequestOptions, SpindleConfig
from vllm_spindle.core.bands import default_num_bands, split_layers, usable_num_bands
from vllm_spindle.core.budget import BandPlan, plan_prompt, shareable_blocks
from vllm_spindle.core.observers import observed_positions
from vllm_spindle.core.pacing import ReductionQueue
from vllm_spindle.core.profile import (
    HeadShares,
    Profile,
    head_blocks,
    make_profile,
    shares_at,
)

SERVERS = RequestOptions()
"""A request that sets nothing for itself."""


@dataclass(frozen=True)
class SpindlePolicy:
    """The decisions that follow from numbers alone.

    Attributes:
        config: what the user asked for.
        num_layers: decoder layers with a KV cache.
        block_size: tokens per block.
        num_queries_per_kv: query heads per kv head (G).
    """

    config: SpindleConfig
    num_layers: int
    block_size: int
    num_queries_per_kv: int

    def __hash__(self) -> int:
        """Worked out once: plans are looked up by it, and a profile has thousands of numbers."""
        return self._hash

    @cached_property
    def _hash(self) -> int:
        return hash((self.config, self.num_layers, self.block_size, self.num_queries_per_kv))

    def __getstate__(self) -> dict[str, Any]:
        """The fields alone: another process hashes the same strings to other numbers."""
        return {each.name: getattr(self, each.name) for each in fields(self)}

    def __post_init__(self) -> None:
        profile = self.profile
        if profile is not None and len(profile[0]) != self.num_layers:
            raise ValueError(
                f"spindle: head_shares: measured on a model of {len(profile[0])} layers, this one "
                f"has {self.num_layers}; make them again with 'vllm-spindle profile MODEL'"
            )
        num_bands = _num_bands(self.config)
        option = "num_bands" if self.config.band_methods is None else "band_methods: bands"
        if num_bands is not None and num_bands > self.num_layers:
            raise ValueError(
                f"spindle: {option}={num_bands}: the model has only {self.num_layers} layers; "
                f"leave num_bands out, or set it to at most {self.num_layers}"
            )
        usable = usable_num_bands(self.num_layers)
        if num_bands is not None and num_bands not in usable:
            shortest, longest = self.num_layers // num_bands, -(-self.num_layers // num_bands)
            raise ValueError(
                f"spindle: {option}={num_bands}: {self.num_layers} layers make bands of {longest} "
                f"and {shortest}, too uneven for one KV-cache group each; leave num_bands out, "
                "or set it to one of " + ", ".join(map(str, usable))
            )

    @property
    def bands(self) -> tuple[range, ...]:
        """Layers of each band, shallow to deep."""
        return _bands(self.num_layers, _num_bands(self.config))

    def band_of_layer(self, layer_idx: int) -> int:
        """The band of a decoder layer."""
        return next(i for i, band in enumerate(self.bands) if layer_idx in band)

    def method_of_band(self, band: int) -> MethodName:
        """What a band does with its context."""
        methods = self.config.band_methods
        return self.config.method if methods is None else methods[band]

    @property
    def profile(self) -> Profile | None:
        """What each kv head keeps; None unless budgets are measured."""
        return _profile(self.config.head_shares) if self.config.budget == "measured" else None

    def head_blocks(self, layer_idx: int, plan: BandPlan, heads: range) -> tuple[int, ...]:
        """Blocks of the reduced region that each of some kv heads of a layer holds.

        Args:
            layer_idx: depth.
            plan: of the layer's band, reduced.
            heads: those of a rank; all of them together hold the region.
        """
        return _head_blocks(
            self,
            layer_idx,
            plan.context_share,
            heads,
            plan.reduced_blocks,
            plan.context_blocks,
        )

    def shareable(
        self, prompt_len: int, options: RequestOptions = SERVERS
    ) -> tuple[int | None, ...]:
        """Blocks from the row's start that the prefix cache may know, per band; None for all."""
        plans = self.plan_request(prompt_len, options)
        return shareable_blocks(plans, prompt_len, self.block_size)

    def observed(self, prompt_len: int, plans: Sequence[BandPlan]) -> np.ndarray:
        """Tokens whose queries score the prompt, ascending; the window last. int64."""
        return observed_positions(
            prompt_len,
            window=self.config.window,
            observers=self.config.num_observers,
            first=plans[0].observed_from,
        )

    def reduce_at(self, prompt_len: int) -> int:
        """Tokens of a request that are computed when its prompt is reduced: its own, and those of
        the answer that were to be waited for."""
        return prompt_len + self.config.reduce_after

    def recorded(self, prompt_len: int, plans: Sequence[BandPlan]) -> np.ndarray:
        """Tokens whose queries are laid aside: those that score, then those waited for. int64."""
        ahead = np.arange(prompt_len, self.reduce_at(prompt_len), dtype=np.int64)
        return np.concatenate([self.observed(prompt_len, plans), ahead])

    def visual_share(self, band: int) -> float:
        """Visual tokens that a band may keep, over what would be proportional, [0, 1]."""
        depth = band / (len(self.bands) - 1) if len(self.bands) > 1 else 1.0
        return 1 - (1 - self.config.deep_visual_share) * depth

    def reduction_queue(self, max_num_batched_tokens: int) -> ReductionQueue:
        """An empty queue that bounds what a step reduces, by the tokens that it may compute."""
        tokens = int(self.config.reduce_share * max_num_batched_tokens)
        return ReductionQueue(self.num_layers, tokens)

    def plan(self, prompt_len: int, keep_ratio: float | None = None) -> tuple[BandPlan, ...]:
        """The plan of one prompt, one entry per band.

        Args:
            prompt_len: prompt tokens.
            keep_ratio: the request's own, (0, 1]; None for the configured one.
        """
        return self.plan_request(prompt_len, RequestOptions(keep_ratio))

    def plan_request(self, prompt_len: int, options: RequestOptions) -> tuple[BandPlan, ...]:
        """The plan of a request's prompt, one entry per band."""
        keep_ratio, protected = options.keep_ratio, options.protected_prefix_tokens
        if keep_ratio is None:
            keep_ratio = self.config.keep_ratio
        if protected is None:
            configured = self.config.protected_prefix_tokens
            protected = 0 if configured == "auto" else configured
        return _plan(self, prompt_len, keep_ratio, min(protected, prompt_len))


def _num_bands(config: SpindleConfig) -> int | None:
    return config.num_bands if config.band_methods is None else len(config.band_methods)


@lru_cache(maxsize=64)
def _bands(num_layers: int, num_bands: int | None) -> tuple[range, ...]:
    return split_layers(num_layers, num_bands or default_num_bands(num_layers))


@lru_cache(maxsize=8)
def _profile(head_shares: PackedShares | None) -> Profile:
    assert head_shares is not None  # the configuration's own check
    return make_profile(dict(head_shares))


@lru_cache(maxsize=16384)
def _head_blocks(
    policy: SpindlePolicy,
    layer_idx: int,
    context_share: Fraction,
    heads: range,
    reduced_blocks: int,
    context_blocks: int,
) -> tuple[int, ...]:
    shares = _head_shares(policy, context_share)[layer_idx]
    return head_blocks(
        [shares[head] for head in heads], reduced_blocks * len(heads), context_blocks
    )


@lru_cache(maxsize=64)
def _head_shares(policy: SpindlePolicy, context_share: Fraction) -> HeadShares:
    """Of all layers, which ask for their own one after the other."""
    profile = policy.profile
    assert profile is not None  # only then do heads differ
    return shares_at(profile, context_share)


@lru_cache(maxsize=16384)
def _plan(
    policy: SpindlePolicy, prompt_len: int, keep_ratio: float, protected_tokens: int
) -> tuple[BandPlan, ...]:
    config = policy.config
    return plan_prompt(
        prompt_len,
        # The decimal that the user wrote: 0.29 of 100 tokens is 29, not 28.
        keep_ratio=Fraction(str(keep_ratio)),
        recent=config.recent,
        block_size=policy.block_size,
        bands=policy.bands,
        beta=Fraction(str(config.beta)),
        # Not resolved for a model: nothing was measured.
        shape="uniform" if config.budget == "auto" else config.budget,
        profile=policy.profile,
        unit_blocks=policy.num_queries_per_kv if config.gqa == "unfold" else 1,
        min_prompt_len=config.min_prompt_len,
        protected_tokens=protected_tokens,
        window=config.window,
        observers=config.num_observers,
    )

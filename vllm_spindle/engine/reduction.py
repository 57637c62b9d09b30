"""The worker's half: reduce prompts that have ended, after the forward that ended them.

After the model returned and before the next step is enqueued, so it does not matter whether the
forward was Python, compiled or a captured graph.

Shapes: K kv heads, G query heads per kv head, T prompt tokens, D head size.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields
from functools import cache
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from vllm_spindle.choice_rule import choice_rule
from vllm_spindle.config import RequestOptions
from vllm_spindle.core.budget import BandPlan
from vllm_spindle.core.choice import ChoiceRule, layers_at_once
from vllm_spindle.core.modality import VisualCap
from vllm_spindle.core.transfer import to_device
from vllm_spindle.engine.cache_layout import CacheLayout, probe_layout
from vllm_spindle.engine.codebook_region import CodebookRegion, CodebookStats
from vllm_spindle.engine.evicted_regions import evict
from vllm_spindle.engine.layer_reduction import LayerReduction
from vllm_spindle.engine.prompt_tokens import (
    PagedTokens,
    PromptTokens,
    ReducedLayer,
    TensorTokens,
    read_in_place,
)
from vllm_spindle.engine.regions import Region, make_region
from vllm_spindle.engine.step import BatchView, PromptEnd, Step
from vllm_spindle.engine.step_planner import StepPlanner
from vllm_spindle.engine.window import WindowStash
from vllm_spindle.policy import SERVERS, SpindlePolicy

CODEBOOK_COUNTS = tuple(each.name for each in fields(CodebookStats))


@dataclass
class ReductionStats:
    """What was done since the last ``take``. Tokens: mean over a band's layers and kv heads."""

    seconds: float = 0.0
    num_reductions: int = 0
    tokens_evicted: list[float] = field(default_factory=list)
    tokens_merged: list[float] = field(default_factory=list)


class Reducer:
    """Plans steps and reduces prompts for one worker."""

    def __init__(
        self,
        policy: SpindlePolicy,
        bands: list[list[ReducedLayer]],
        stash: WindowStash,
        first_kv_head: int = 0,
        *,
        in_place: bool = False,
    ) -> None:
        """For one rank, whose kv heads are all those of its caches, from ``first_kv_head`` on.

        Args:
            policy: the plan.
            bands: their layers.
            stash: the observed queries.
            first_kv_head: of the model's.
            in_place: whether Triton kernels score and move tokens where they lie in the cache.
        """
        self.policy = policy
        self.bands = bands
        self.stash = stash
        self._in_place = in_place
        head_size = bands[0][0].kv_cache.shape[-1] // 2
        num_kv_heads = bands[0][0].kv_cache.shape[1]
        self.heads = range(first_kv_head, first_kv_head + num_kv_heads)
        self.regions = [
            make_region(policy, band, head_size, self.heads) for band in range(len(bands))
        ]
        self._planner = StepPlanner(policy, self.regions, self.heads)
        self._layout: CacheLayout | None = None
        self._visual_masks: dict[str, Tensor] = {}
        self._stats = self._empty_stats()

    @property
    def layout(self) -> CacheLayout:
        """How this vLLM packs a block, found out on first use."""
        if self._layout is None:
            layer = self.bands[0][0]
            self._layout = probe_layout(layer.kv_cache, layer.write)
            if self._in_place and not read_in_place(self._layout, layer.kv_cache):
                raise RuntimeError(
                    "spindle: this vLLM does not keep a token's key and value side by side in "
                    f"the cache, as our kernels read it: {tuple(layer.kv_cache.shape)}"
                )
        return self._layout

    def warm_up(self) -> None:
        """Probe the cache and compile what prompts need, at start-up instead of in a request.

        A sham prompt goes through the real code, in blocks that no request holds yet: through one
        region of each kind.
        """
        _ = self.layout
        warm: set[type] = set()
        for band, region in enumerate(self.regions):
            if type(region) not in warm:
                self._warm_up_region(region, self.bands[band][0])
                warm.add(type(region))

    def _warm_up_region(self, region: Region, layer: ReducedLayer) -> None:
        _, num_kv_heads, block_size, width = layer.kv_cache.shape
        device = layer.kv_cache.device
        plan = BandPlan(first_block=1, tail_block=3, prompt_blocks=3)
        blocks = torch.tensor([1, 2], device=device)
        num_tokens, group = 3 * block_size, self.policy.num_queries_per_kv
        tokens = torch.randn(num_kv_heads, num_tokens, width // 2).to(layer.kv_cache)
        prompt_tokens: PromptTokens = TensorTokens(layer, tokens, tokens, num_tokens)
        if self._in_place:
            prompt_tokens.keep(
                torch.arange(2 * block_size, device=device).repeat(num_kv_heads, 1), blocks
            )
            # The first block once more: there may be no third one.
            prompt_tokens = self._tokens(layer, blocks[[0, 1, 0]], num_tokens)
        positions = torch.arange(2 * block_size, num_tokens, device=device)
        # In memory as the stash has them: kernels are compiled for some properties of strides.
        queries = torch.randn(block_size, num_kv_heads, group, width // 2).permute(1, 2, 0, 3)
        work = LayerReduction(
            layer,
            plan,
            blocks,
            queries=queries.to(layer.kv_cache),
            positions=positions if self._in_place else positions.cpu(),
            tokens=prompt_tokens,
            rule=self._rule(0, 0),
            num_ahead=min(1, self.policy.config.reduce_after),
        )
        if isinstance(region, CodebookRegion):
            region.fill(work)
            region.stats = CodebookStats()
        else:
            evict([region], [work])

    def take_stats(self) -> dict[str, Any] | None:
        """The numbers since the last call, which start again from zero; None if there are none."""
        stats, self._stats = self._stats, self._empty_stats()
        if not stats.seconds:
            return None
        return {
            "seconds": stats.seconds,
            "reductions": stats.num_reductions,
            "bands": {
                "tokens_evicted": stats.tokens_evicted,
                "tokens_merged": stats.tokens_merged,
                **self._codebook_stats(),
            },
        }

    def _codebook_stats(self) -> dict[str, list[float]]:
        counts = {name: [0.0] * len(self.bands) for name in CODEBOOK_COUNTS}
        for band, region in enumerate(self.regions):
            if isinstance(region, CodebookRegion):
                for name in CODEBOOK_COUNTS:
                    counts[name][band] = getattr(region.stats, name)
                region.stats = CodebookStats()
        return {f"codebook_{name}": values for name, values in counts.items()}

    def _empty_stats(self) -> ReductionStats:
        num_bands = len(self.bands)
        return ReductionStats(tokens_evicted=[0] * num_bands, tokens_merged=[0] * num_bands)

    def admit(
        self,
        request_id: str,
        prompt_len: int,
        options: RequestOptions = SERVERS,
        visual_mask: Tensor | None = None,
    ) -> None:
        """Plan a request's prompt.

        Args:
            request_id: vLLM's.
            prompt_len: T.
            options: what the request sets for itself.
            visual_mask: True = visual token, [T]; None if the prompt has none.
        """
        if self._planner.admit(request_id, prompt_len, options) and visual_mask is not None:
            self._visual_masks[request_id] = visual_mask

    def forget(self, request_id: str) -> None:
        """The request is over."""
        self._planner.forget(request_id)
        self._visual_masks.pop(request_id, None)
        self.stash.release(request_id)

    def plan_step(self, batch: BatchView) -> Step:
        """The step's geometry, before its forward."""
        return self._planner.plan_step(batch)

    def holders(self) -> list[str]:
        """Requests that anything is kept of, once for each thing."""
        return [*self._planner.request_ids, *self._visual_masks, *self.stash.holders()]

    def reduce(
        self,
        end: PromptEnd,
        first_layer: int,
        stop_layer: int,
        block_ids: Callable[[int, str], Tensor],
    ) -> None:
        """Compact some layers of one ended prompt, where their bands reduce it.

        Args:
            end: the prompt.
            first_layer, stop_layer: the layers, of all; the last one ends the reduction.
            block_ids: ``(band, request id) -> block ids of the row``, int64, at least the prompt's.
        """
        started = time.perf_counter()
        read = self._prompt_reader(end, block_ids)
        for layers in self._batches(end, range(first_layer, stop_layer)):
            work = [read(layer_idx) for layer_idx in layers]
            for layer_idx, each, kept in zip(layers, work, self._fill(layers, work), strict=True):
                self._count(layer_idx, len(each.context) - kept, kept)
        if stop_layer == self.policy.num_layers:
            self.stash.release(end.request_id)
            self._stats.num_reductions += 1
        self._stats.seconds += time.perf_counter() - started

    def _batches(self, end: PromptEnd, layers: range) -> Iterator[list[int]]:
        """Layers that are reduced, those together that are ranked in one go."""
        bands = self.policy.band_of_layer
        at_once = 1  # as tensors, each layer's tokens are copied
        if self._in_place:
            num_heads = len(self.heads) * self.policy.num_queries_per_kv
            at_once = layers_at_once(num_heads, end.prompt_len)

        def kind(layer_idx: int) -> tuple[int, ...]:
            band = bands(layer_idx)
            plan = end.plans[band]
            if isinstance(self.regions[band], CodebookRegion):
                return (layer_idx,)
            own = band if self._visual_cap(end.request_id, band) else -1
            return plan.prefix_blocks, plan.tail_block, own

        reduced = [each for each in layers if end.plans[bands(each)].is_reduced]
        for _, alike in groupby(reduced, kind):
            together = list(alike)
            for first in range(0, len(together), at_once):
                yield together[first : first + at_once]

    def _fill(self, layers: list[int], work: list[LayerReduction]) -> list[float]:
        """Context tokens that stay visible in each of some layers that go together."""
        regions = [self.regions[self.policy.band_of_layer(layer_idx)] for layer_idx in layers]
        if isinstance(regions[0], CodebookRegion):
            return [regions[0].fill(work[0])]
        return evict(regions, work)

    def _count(self, layer_idx: int, evicted: float, kept: float) -> None:
        band = self.policy.band_of_layer(layer_idx)
        num_layers = len(self.policy.bands[band])
        self._stats.tokens_evicted[band] += evicted / num_layers
        if isinstance(self.regions[band], CodebookRegion):
            self._stats.tokens_merged[band] += kept / num_layers

    def _visual_cap(self, request_id: str, band: int) -> VisualCap | None:
        mask, share = self._visual_masks.get(request_id), self.policy.visual_share(band)
        return None if mask is None or share == 1 else VisualCap(mask, share)

    def _prompt_reader(
        self, end: PromptEnd, block_ids: Callable[[int, str], Tensor]
    ) -> Callable[[int], LayerReduction]:
        """What reads the prompt in a layer."""
        recorded = torch.from_numpy(self.policy.recorded(end.prompt_len, end.plans))
        num_ahead = int((recorded >= end.prompt_len).sum())
        device = self.bands[0][0].kv_cache.device
        positions = to_device(recorded, device) if self._in_place else recorded
        rows = cache(lambda band: block_ids(band, end.request_id))

        def read(layer_idx: int) -> LayerReduction:
            band = self.policy.band_of_layer(layer_idx)
            layer = self.bands[band][layer_idx - self.policy.bands[band].start]
            plan, blocks = end.plans[band], rows(band)
            queries = self.stash.read(layer_idx, end.request_id)
            # [Q, K * G, D] -> [K, G, Q, D]
            queries = queries.view(len(queries), layer.kv_cache.shape[1], -1, queries.shape[-1])
            return LayerReduction(
                layer,
                plan,
                blocks[plan.first_block : plan.tail_block],
                queries=queries.permute(1, 2, 0, 3),
                positions=positions,
                tokens=self._tokens(layer, blocks[: plan.prompt_blocks], end.prompt_len),
                rule=self._rule(layer_idx, end.prompt_len),
                num_ahead=num_ahead,
                visual=self._visual_cap(end.request_id, band),
            )

        return read

    def _tokens(self, layer: ReducedLayer, blocks: Tensor, prompt_len: int) -> PromptTokens:
        if self._in_place:
            return PagedTokens(layer, self.layout, blocks, prompt_len)
        return TensorTokens(layer, *self.layout.read(layer.kv_cache, blocks), prompt_len)

    def _rule(self, layer_idx: int, prompt_len: int) -> ChoiceRule:
        config = self.policy.config
        # The random baseline must not drop the same positions in every layer and prompt.
        seed = (config.seed * 1009 + layer_idx) * 65537 + prompt_len
        return choice_rule(config, seed=seed)

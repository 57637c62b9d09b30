"""The worker's half: plan a step's rows before the forward, reduce ended prompts after it.

Nothing here runs inside a forward pass: ``plan_step`` runs when attention metadata is built, the
reduction after the model returned, before the next step is enqueued. So it does not matter
whether the forward was Python, compiled or a captured graph.

Shapes: K kv heads, G query heads per kv head, T prompt tokens, D head size.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vllm_spindle.choice_rule import choice_rule
from vllm_spindle.config import RequestOptions
from vllm_spindle.core.budget import BandPlan
from vllm_spindle.core.choice import ChoiceRule
from vllm_spindle.core.modality import VisualCap
from vllm_spindle.engine.cache_layout import CacheLayout, probe_layout
from vllm_spindle.engine.head_table import pages
from vllm_spindle.engine.regions import (
    CodebookRegion,
    CodebookStats,
    DenseRegion,
    HeadRegion,
    LayerPrompt,
    ReducedLayer,
    make_region,
)
from vllm_spindle.engine.step import (
    BandRows,
    BatchView,
    CodebookRows,
    HeadRows,
    PromptEnd,
    Step,
    WindowRows,
)
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


@dataclass(frozen=True)
class PastRows:
    """One band's rows whose prompts have been reduced, by what their regions hold."""

    dense: BandRows | None = None
    codebooks: CodebookRows | None = None
    heads: HeadRows | None = None


class Reducer:
    """Plans steps and reduces prompts for one worker."""

    def __init__(
        self,
        policy: SpindlePolicy,
        bands: list[list[ReducedLayer]],
        stash: WindowStash,
        first_kv_head: int = 0,
    ) -> None:
        """For one rank, whose kv heads are all those of its caches, from ``first_kv_head`` on."""
        config = policy.config
        self.policy = policy
        self.bands = bands
        self.stash = stash
        self.num_copies = policy.num_queries_per_kv if config.gqa == "unfold" else 1
        head_size = bands[0][0].kv_cache.shape[-1] // 2
        num_kv_heads = bands[0][0].kv_cache.shape[1]
        self.heads = range(first_kv_head, first_kv_head + num_kv_heads)
        self.regions = [
            make_region(policy, band, head_size, self.heads) for band in range(len(bands))
        ]
        self._layout: CacheLayout | None = None
        self._plans: dict[str, tuple[BandPlan, ...]] = {}
        self._visual_masks: dict[str, Tensor] = {}
        self._past: list[str | None] = []
        self._past_rows: tuple[PastRows, ...] = (PastRows(),) * len(bands)
        self._stats = self._empty_stats()

    @property
    def layout(self) -> CacheLayout:
        """How this vLLM packs a block, found out on first use."""
        if self._layout is None:
            layer = self.bands[0][0]
            self._layout = probe_layout(layer.kv_cache, layer.write)
        return self._layout

    def warm_up(self) -> None:
        """Probe the cache and compile what codebooks need, at start-up instead of in a request.

        A sham prompt goes through the real code, in blocks that no request holds yet.
        """
        _ = self.layout
        for band, region in enumerate(self.regions):
            if isinstance(region, CodebookRegion):
                self._warm_up_region(region, self.bands[band][0])
                return

    def _warm_up_region(self, region: CodebookRegion, layer: ReducedLayer) -> None:
        num_kv_heads = layer.kv_cache.shape[1]
        block_size = self.policy.block_size
        plan = BandPlan(first_block=1, tail_block=3, prompt_blocks=3)
        tokens = torch.randn(num_kv_heads, 3 * block_size, region.head_size)
        tokens = tokens.to(layer.kv_cache)
        prompt = LayerPrompt(
            queries=torch.randn(
                num_kv_heads, self.policy.num_queries_per_kv, block_size, region.head_size
            ).to(layer.kv_cache.device),
            positions=torch.arange(2 * block_size, 3 * block_size),
            keys=tokens,
            values=tokens,
            prompt_len=3 * block_size,
            rule=self._rule(0, 0),
        )
        region.fill(layer, prompt, plan, torch.tensor([1, 2], device=layer.kv_cache.device))
        region.stats = CodebookStats()

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
        plans = self.policy.plan_request(prompt_len, options)
        if any(plan.is_reduced for plan in plans):
            self._plans[request_id] = plans
            if visual_mask is not None:
                self._visual_masks[request_id] = visual_mask

    def forget(self, request_id: str) -> None:
        """The request is over."""
        self._plans.pop(request_id, None)
        self._visual_masks.pop(request_id, None)
        self.stash.release(request_id)

    def plan_step(self, batch: BatchView) -> Step:
        """The step's geometry, before its forward."""
        past: list[str | None] = []
        ends: list[PromptEnd] = []
        sources: list[Tensor] = []
        counts: list[tuple[str, int]] = []
        token = 0
        rows = zip(
            batch.request_ids,
            batch.prompt_lens.tolist(),
            batch.num_computed.tolist(),
            batch.num_scheduled.tolist(),
            strict=True,
        )
        for request_id, prompt_len, computed, scheduled in rows:
            plans = self._plans.get(request_id)
            reduce_at = self.policy.reduce_at(prompt_len)
            is_past = computed >= reduce_at
            past.append(request_id if is_past and plans else None)
            if plans and not is_past:
                recorded = self.policy.recorded(prompt_len, plans)
                first, stop = np.searchsorted(recorded, (computed, computed + scheduled))
                if first < stop:
                    sources.append(torch.from_numpy(recorded[first:stop] + (token - computed)))
                    counts.append((request_id, int(stop - first)))
                if computed + scheduled >= reduce_at:
                    ends.append(PromptEnd(request_id, prompt_len, plans))
            token += scheduled
        self._plan_rows(past)
        return Step(
            bands=tuple(rows.dense for rows in self._past_rows),
            codebooks=tuple(rows.codebooks for rows in self._past_rows),
            heads=tuple(rows.heads for rows in self._past_rows),
            window=WindowRows(torch.cat(sources), tuple(counts)) if sources else None,
            prompt_ends=tuple(ends),
        )

    def _plan_rows(self, past: list[str | None]) -> None:
        """Per band, the geometry of the rows that are reduced, None for the others.

        Unchanged from one decode step to the next until a request comes or goes.
        """
        if past == self._past:
            return
        self._past = past
        plans = [self._plans[request_id] if request_id else None for request_id in past]
        self._past_rows = tuple(
            self._band_rows(band, [p[band] if p else None for p in plans])
            for band in range(len(self.regions))
        )

    def _band_rows(self, band: int, plans: list[BandPlan | None]) -> "PastRows":
        region = self.regions[band]
        if isinstance(region, HeadRegion):
            _, apart = pages(self.bands[band][0].kv_cache)
            return PastRows(heads=HeadRows.of(plans, partial(self._head_blocks, band), apart))
        if isinstance(region, DenseRegion):
            return PastRows(dense=BandRows.of(plans, self.num_copies))
        assert isinstance(region, CodebookRegion)
        reduced = [(row, plan) for row, plan in enumerate(plans) if plan and plan.is_reduced]
        if not reduced:
            return PastRows()
        shapes = [region.shape(plan) for _, plan in reduced]
        codebooks = CodebookRows(
            rows=torch.tensor([row for row, _ in reduced]),
            starts=_int32([(plan.first_block, plan.tail_block) for _, plan in reduced]),
            prefix_blocks=torch.tensor([p.prefix_blocks for _, p in reduced], dtype=torch.int32),
            shapes=_int32([(s.num_key_entries, s.num_value_entries, s.num_tokens) for s in shapes]),
        )
        tails = [
            replace(plan, first_block=plan.tail_block, prefix_blocks=0)
            if plan and plan.is_reduced
            else None
            for plan in plans
        ]
        return PastRows(dense=BandRows.of(tails, num_copies=1), codebooks=codebooks)

    def _head_blocks(self, band: int, plan: BandPlan) -> list[tuple[int, ...]]:
        """Blocks of each kv head, layer by layer."""
        layers = self.policy.bands[band]
        return [self.policy.head_blocks(layer_idx, plan, self.heads) for layer_idx in layers]

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
        for band, layers in enumerate(self.policy.bands):
            plan = end.plans[band]
            mine = range(max(first_layer, layers.start), min(stop_layer, layers.stop))
            if not mine or not plan.is_reduced:
                continue
            row_blocks = block_ids(band, end.request_id)
            region = self.regions[band]
            blocks = row_blocks[plan.first_block : plan.tail_block]
            kept = 0.0
            visual = self._visual_cap(end.request_id, band)
            for layer_idx in mine:
                layer = self.bands[band][layer_idx - layers.start]
                prompt = self._read_prompt(layer, end, row_blocks[: plan.prompt_blocks], visual)
                kept += region.fill(layer, prompt, plan, blocks)
            num_context = plan.context_blocks * self.policy.block_size
            evicted = num_context * len(mine) - kept
            self._stats.tokens_evicted[band] += evicted / len(layers)
            if isinstance(region, CodebookRegion):
                self._stats.tokens_merged[band] += kept / len(layers)
        if stop_layer == self.policy.num_layers:
            self.stash.release(end.request_id)
            self._stats.num_reductions += 1
        self._stats.seconds += time.perf_counter() - started

    def _visual_cap(self, request_id: str, band: int) -> VisualCap | None:
        mask, share = self._visual_masks.get(request_id), self.policy.visual_share(band)
        return None if mask is None or share == 1 else VisualCap(mask, share)

    def _read_prompt(
        self, layer: ReducedLayer, end: PromptEnd, blocks: Tensor, visual: VisualCap | None
    ) -> LayerPrompt:
        keys, values = self.layout.read(layer.kv_cache, blocks)
        num_kv_heads, _, head_size = keys.shape
        queries = self.stash.read(layer.layer_idx, end.request_id)
        positions = self.policy.recorded(end.prompt_len, end.plans)
        return LayerPrompt(
            # [Q, K * G, D] -> [K, G, Q, D]
            queries=queries.view(len(queries), num_kv_heads, -1, head_size).permute(1, 2, 0, 3),
            positions=torch.from_numpy(positions),
            keys=keys,
            values=values,
            prompt_len=end.prompt_len,
            rule=self._rule(layer.layer_idx, end.prompt_len),
            visual=visual,
        )

    def _rule(self, layer_idx: int, prompt_len: int) -> ChoiceRule:
        config = self.policy.config
        # The random baseline must not drop the same positions in every layer and prompt.
        seed = (config.seed * 1009 + layer_idx) * 65537 + prompt_len
        return choice_rule(config, seed=seed)


def _int32(rows: list[tuple[int, ...]]) -> Tensor:
    return torch.tensor(rows, dtype=torch.int32)

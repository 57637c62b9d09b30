"""What a step's rows look like to the kernels: planned when attention metadata is built.

Nothing here runs inside a forward pass, so it does not matter whether that is Python, compiled or a
captured graph.
"""

from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from torch import Tensor

from vllm_spindle.config import RequestOptions
from vllm_spindle.core.budget import BandPlan
from vllm_spindle.engine.codebook_region import CodebookRegion
from vllm_spindle.engine.evicted_regions import DenseRegion, HeadRegion
from vllm_spindle.engine.regions import Region
from vllm_spindle.engine.step import (
    BandRows,
    BatchView,
    CodebookRows,
    HeadRows,
    PromptEnd,
    Step,
    WindowRows,
)
from vllm_spindle.policy import SpindlePolicy


@dataclass(frozen=True)
class PastRows:
    """One band's rows whose prompts have been reduced, by what their regions hold."""

    dense: BandRows | None = None
    codebooks: CodebookRows | None = None
    heads: HeadRows | None = None


class StepPlanner:
    """Plans one worker's steps from the plans of its requests."""

    def __init__(self, policy: SpindlePolicy, regions: list[Region], heads: range) -> None:
        """Args: regions: of the bands; heads: kv heads of this rank."""
        self._policy, self._regions, self._heads = policy, regions, heads
        self._num_copies = policy.num_queries_per_kv if policy.config.gqa == "unfold" else 1
        self._plans: dict[str, tuple[BandPlan, ...]] = {}
        self._past: list[str | None] = []
        self._past_rows: tuple[PastRows, ...] = (PastRows(),) * len(regions)

    @property
    def request_ids(self) -> list[str]:
        """Requests whose prompts are reduced, or will be."""
        return list(self._plans)

    def admit(self, request_id: str, prompt_len: int, options: RequestOptions) -> bool:
        """Plan a request's prompt: whether any band reduces it."""
        plans = self._policy.plan_request(prompt_len, options)
        is_reduced = any(plan.is_reduced for plan in plans)
        if is_reduced:
            self._plans[request_id] = plans
        return is_reduced

    def forget(self, request_id: str) -> None:
        """The request is over."""
        self._plans.pop(request_id, None)

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
            reduce_at = self._policy.reduce_at(prompt_len)
            is_past = computed >= reduce_at
            past.append(request_id if is_past and plans else None)
            if plans and not is_past:
                recorded = self._policy.recorded(prompt_len, plans)
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
            for band in range(len(self._regions))
        )

    def _band_rows(self, band: int, plans: list[BandPlan | None]) -> "PastRows":
        region = self._regions[band]
        if isinstance(region, HeadRegion):
            return PastRows(heads=HeadRows.of(plans, partial(self._head_blocks, band)))
        if isinstance(region, DenseRegion):
            return PastRows(dense=BandRows.of(plans, self._num_copies))
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
        layers = self._policy.bands[band]
        return [self._policy.head_blocks(layer_idx, plan, self._heads) for layer_idx in layers]


def _int32(rows: list[tuple[int, ...]]) -> Tensor:
    return torch.tensor(rows, dtype=torch.int32)

"""The worker's half: plan a step's rows before the forward, reduce ended prompts after it.

Nothing here runs inside a forward pass: ``plan_step`` runs when attention metadata is built, the
reduction after the model returned, before the next step is enqueued. So it does not matter
whether the forward was Python, compiled or a captured graph.

Shapes: K kv heads, G query heads per kv head, T prompt tokens, D head size.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from vllm_spindle.core.budget import BandPlan
from vllm_spindle.core.choice import ChoiceRule, choose_kept
from vllm_spindle.core.eviction import gather_kept
from vllm_spindle.engine.cache_layout import CacheLayout, probe_layout
from vllm_spindle.engine.step import BandRows, BatchView, PromptEnd, Step, WindowRows
from vllm_spindle.engine.window import WindowStash
from vllm_spindle.policy import SpindlePolicy


@dataclass(frozen=True)
class ReducedLayer:
    """One attention layer of a band, as the reduction needs it.

    Attributes:
        layer_idx: depth in the model.
        kv_cache: the layer's cache. [B, K, N, 2 * D].
        scale: softmax scale.
        write: vLLM's own cache write for this layer.
    """

    layer_idx: int
    kv_cache: Tensor
    scale: float
    write: Callable[[Tensor, Tensor, Tensor, Tensor], None]


@dataclass
class ReductionStats:
    """What was done since the last ``take``. Tokens are per layer of a band."""

    seconds: float = 0.0
    num_reductions: int = 0
    tokens_evicted: list[int] = field(default_factory=list)

    def take(self) -> dict[str, float | int | list[int]]:
        """The numbers, which start again from zero."""
        taken = {
            "seconds": self.seconds,
            "reductions": self.num_reductions,
            "tokens_evicted": self.tokens_evicted,
        }
        self.seconds, self.num_reductions = 0.0, 0
        self.tokens_evicted = [0] * len(self.tokens_evicted)
        return taken


class Reducer:
    """Plans steps and reduces prompts for one worker."""

    def __init__(
        self, policy: SpindlePolicy, bands: list[list[ReducedLayer]], stash: WindowStash
    ) -> None:
        config = policy.config
        self.policy = policy
        self.bands = bands
        self.stash = stash
        self.stats = ReductionStats(tokens_evicted=[0] * len(bands))
        self.num_copies = policy.num_queries_per_kv if config.gqa == "unfold" else 1
        self._window = config.window
        self._layout: CacheLayout | None = None
        self._plans: dict[str, tuple[BandPlan, ...]] = {}
        self._past: list[str | None] = []
        self._past_rows: tuple[BandRows | None, ...] = (None,) * len(bands)

    def admit(self, request_id: str, prompt_len: int, keep_ratio: float | None) -> None:
        """Plan a request's prompt; ``keep_ratio`` None for the server's."""
        plans = self.policy.plan(prompt_len, keep_ratio)
        if any(plan.is_reduced for plan in plans):
            self._plans[request_id] = plans

    def forget(self, request_id: str) -> None:
        """The request is over."""
        self._plans.pop(request_id, None)
        self.stash.release(request_id)

    def plan_step(self, batch: BatchView) -> Step:
        """The step's geometry, before its forward."""
        past: list[str | None] = []
        ends: list[PromptEnd] = []
        sources: list[Tensor] = []
        targets: list[Tensor] = []
        token = 0
        rows = zip(
            batch.request_ids,
            batch.prompt_lens.tolist(),
            batch.num_computed.tolist(),
            batch.num_scheduled.tolist(),
            strict=True,
        )
        for row, (request_id, prompt_len, computed, scheduled) in enumerate(rows):
            plans = self._plans.get(request_id)
            is_past = computed >= prompt_len
            past.append(request_id if is_past and plans else None)
            if plans and not is_past:
                first = max(computed, prompt_len - self._window)
                stop = min(computed + scheduled, prompt_len)
                if first < stop:
                    slot = self.stash.slot(request_id)
                    offset = first - (prompt_len - self._window)
                    sources.append(torch.arange(stop - first) + (token + first - computed))
                    targets.append(self.stash.rows(slot, offset, stop - first))
                    if stop == prompt_len:
                        ends.append(PromptEnd(row, request_id, prompt_len, plans, slot))
            token += scheduled
        return Step(
            bands=self._band_rows(past),
            window=WindowRows(torch.cat(sources), torch.cat(targets)) if sources else None,
            prompt_ends=tuple(ends),
        )

    def _band_rows(self, past: list[str | None]) -> tuple[BandRows | None, ...]:
        """Per band, the geometry of the rows that are reduced, None for the others.

        Unchanged from one decode step to the next until a request comes or goes.
        """
        if past != self._past:
            self._past = past
            plans = [self._plans[request_id] if request_id else None for request_id in past]
            self._past_rows = tuple(
                BandRows.of([p[band] if p else None for p in plans], self.num_copies)
                for band in range(len(self.bands))
            )
        return self._past_rows

    def reduce(self, end: PromptEnd, block_ids: Callable[[int, int], Tensor]) -> None:
        """Compact one ended prompt in every band that reduces it.

        Args:
            end: the prompt.
            block_ids: ``(band, row) -> block ids of the row``, int64, at least the prompt's.
        """
        started = time.perf_counter()
        for band, plan in enumerate(end.plans):
            if not plan.is_reduced:
                continue
            row_blocks = block_ids(band, end.row)
            for layer in self.bands[band]:
                self._reduce_layer(layer, end, plan, row_blocks)
            block_size = self.policy.block_size
            kept = plan.reduced_blocks * block_size // self.num_copies
            self.stats.tokens_evicted[band] += plan.tail_block * block_size - kept
        self.stash.release(end.request_id)
        self.stats.num_reductions += 1
        self.stats.seconds += time.perf_counter() - started

    def _reduce_layer(
        self, layer: ReducedLayer, end: PromptEnd, plan: BandPlan, row_blocks: Tensor
    ) -> None:
        """Keep the chosen context tokens of one layer in its reduced region."""
        block_size = self.policy.block_size
        if self._layout is None:
            self._layout = probe_layout(layer.kv_cache, layer.write)
        keys, values = self._layout.read(layer.kv_cache, row_blocks[: plan.prompt_blocks])
        num_kv_heads, _, head_size = keys.shape
        queries = self.stash.read(layer.layer_idx, end.slot)
        kept = choose_kept(
            self._rule(layer.layer_idx, end.prompt_len),
            # [W, K * G, D] -> [K, G, W, D]
            queries.view(len(queries), num_kv_heads, -1, head_size).permute(1, 2, 0, 3),
            keys[:, : end.prompt_len],
            scale=layer.scale,
            num_context=plan.tail_block * block_size,
            num_kept=plan.reduced_blocks * block_size // self.num_copies,
        )
        region = row_blocks[plan.first_block : plan.tail_block]
        slots = (region.unsqueeze(1) * block_size + torch.arange(block_size)).flatten()
        copies = kept.unbind(1) if kept.dim() == 3 else (kept,)
        for copy, copy_slots in zip(copies, slots.chunk(len(copies)), strict=True):
            if len(copy_slots):
                layer.write(
                    gather_kept(keys, copy).transpose(0, 1).contiguous(),
                    gather_kept(values, copy).transpose(0, 1).contiguous(),
                    layer.kv_cache,
                    copy_slots,
                )

    def _rule(self, layer_idx: int, prompt_len: int) -> ChoiceRule:
        config = self.policy.config
        # The random baseline must not drop the same positions in every layer and prompt.
        seed = (config.seed * 1009 + layer_idx) * 65537 + prompt_len
        return ChoiceRule(config.score, config.pool_kernel, config.gqa, seed)

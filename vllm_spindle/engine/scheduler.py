"""The scheduler's adapter: hold prompts until they are reduced, free early, count.

It also keeps chunks off the point where a prompt is reduced.
"""

from typing import Any

from vllm.v1.request import Request

from vllm_spindle.config import RequestOptions
from vllm_spindle.core.branches import BranchIndex
from vllm_spindle.engine.manager import SpindleManager
from vllm_spindle.engine.options import protect_prefix, request_options
from vllm_spindle.policy import SERVERS


class SpindleSchedulerMixin:
    """Mixed into vLLM's scheduler class, synchronous or asynchronous."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._options: dict[str, RequestOptions] = {}
        self._reduced: set[str] = set()
        self._bands: list[SpindleManager] = [
            manager
            for manager in self.kv_cache_manager.coordinator.single_type_managers
            if isinstance(manager, SpindleManager)
        ]
        self._bands.sort(key=lambda manager: manager.band)
        for manager in self._bands:
            manager.share_options(self._options)
        self._policy = self._bands[0].policy
        is_auto = self._policy.config.protected_prefix_tokens == "auto"
        self._branches = BranchIndex() if is_auto else None
        self._queue = self._policy.reduction_queue(self.scheduler_config.max_num_batched_tokens)
        self._stats = _empty_stats(len(self._bands))

    def add_request(self, request: Request) -> None:
        """Remember what the request sets for itself, or what recurs of it, before it is queued."""
        options = request_options(request.sampling_params)
        if self._branches is not None:
            num_blocks = self._branches.add(request.block_hashes)
            if num_blocks and options.protected_prefix_tokens is None:
                request.sampling_params = protect_prefix(
                    request.sampling_params, num_blocks * self.hash_block_size
                )
                options = request_options(request.sampling_params)
        if options != SERVERS:
            self._options[request.request_id] = options
        super().add_request(request)

    def schedule(self, *args: Any, **kwargs: Any) -> Any:
        """vLLM's schedule, after reduced prompts have given their blocks back.

        vLLM itself asks per request, in turn: a request that was just prefilled is asked last,
        and an earlier one in need of a block would preempt it although its own surplus
        suffices.
        """
        for request in self.running:
            if request.request_id not in self._reduced:
                self._free_if_processed(request)
        output = super().schedule(*args, **kwargs)
        self._advance(output.num_scheduled_tokens)
        return output

    def _advance(self, num_scheduled_tokens: dict[str, int]) -> None:
        """What the worker will reduce after this step: see ``RunnerReduction.finish``."""
        ended = [
            request
            for request in self.running
            if request.request_id not in self._reduced
            and request.num_computed_tokens == self._policy.reduce_at(request.num_prompt_tokens)
            and request.request_id in num_scheduled_tokens
        ]
        for request in sorted(ended, key=lambda request: request.request_id):
            num_tokens = request.num_prompt_tokens
            plans = [manager.plan(request.request_id, num_tokens) for manager in self._bands]
            if any(plan.is_reduced for plan in plans):
                self._queue.push(request.request_id, num_tokens)
        self._queue.advance()

    def _free_if_processed(self, request: Request) -> None:
        processed = request.num_computed_tokens - request.num_in_flight_tokens
        reduce_at = self._policy.reduce_at(request.num_prompt_tokens)
        if processed < reduce_at or request.request_id in self._queue:
            return
        self.kv_cache_manager.remove_skipped_blocks(
            request.request_id, processed, request.num_prompt_tokens
        )
        self._reduced.add(request.request_id)
        for band, manager in enumerate(self._bands):
            plan = manager.plan(request.request_id, request.num_prompt_tokens)
            self._stats["bands"]["prompt_blocks"][band] += plan.prompt_blocks
            # Counted, not planned: whoever compares it with the plan learns something.
            self._stats["bands"]["protected_blocks"][band] += plan.prefix_blocks
            self._stats["bands"]["held_blocks"][band] += manager.count_held(
                request.request_id, request.num_prompt_tokens
            )

    def _reserve_prefill_lookahead(
        self, request: Request, num_computed_tokens: int, num_new_tokens: int
    ) -> int:
        """No tokens while the prompt waits for its reduction; no chunk across that point.

        Only a request resumed after preemption could: it prefills prompt and output. Stopping
        where the prompt is reduced lets its output attend to the reduced cache again, as it did
        before.
        """
        if request.request_id in self._queue:
            return 0
        num_new_tokens = super()._reserve_prefill_lookahead(
            request, num_computed_tokens, num_new_tokens
        )
        left = self._policy.reduce_at(request.num_prompt_tokens) - num_computed_tokens
        return left if 0 < left < num_new_tokens else num_new_tokens

    def _get_local_prefix_cache_hit(self, request: Request) -> Any:
        """vLLM's lookup, cut before the request's own region and window, the same in all bands.

        The window's queries have to be computed, and the region must be the request's own.
        """
        blocks, num_tokens, boundary, diverged = super()._get_local_prefix_cache_hit(request)
        limits = [manager.max_hit_tokens(request) for manager in self._bands]
        most = min((limit for limit in limits if limit is not None), default=num_tokens)
        if num_tokens <= most:
            return blocks, num_tokens, boundary, diverged
        return self.kv_cache_manager.truncate_computed_blocks(blocks, most), most, 0, False

    def _preempt_request(self, request: Request, *args: Any, **kwargs: Any) -> None:
        super()._preempt_request(request, *args, **kwargs)
        self._queue.drop(request.request_id)
        self._reduced.discard(request.request_id)

    def _free_blocks(self, request: Request) -> None:
        super()._free_blocks(request)
        self._queue.drop(request.request_id)
        self._reduced.discard(request.request_id)
        self._options.pop(request.request_id, None)

    def update_from_output(self, scheduler_output: Any, model_runner_output: Any) -> Any:
        """vLLM's update, after the worker's reduction numbers are added up."""
        worker = (model_runner_output.plugin_stats or {}).get("spindle")
        if worker is not None:
            stats = self._stats
            stats["reductions"] += worker["reductions"]
            stats["seconds"] += worker["seconds"]
            for name, counts in worker["bands"].items():
                total = stats["bands"].setdefault(name, [0] * len(counts))
                stats["bands"][name] = [a + b for a, b in zip(total, counts, strict=True)]
        return super().update_from_output(scheduler_output, model_runner_output)

    def make_stats(self, *args: Any, **kwargs: Any) -> Any:
        """vLLM's step statistics, with ours beside them."""
        scheduler_stats = super().make_stats(*args, **kwargs)
        if scheduler_stats is None:
            return None
        for band, manager in enumerate(self._bands):
            self._stats["bands"]["blocks_freed"][band] += manager.num_freed_blocks
            manager.num_freed_blocks = 0
        stats = {"spindle": self._stats}
        scheduler_stats.plugin_stats = {**(scheduler_stats.plugin_stats or {}), **stats}
        self._stats = _empty_stats(len(self._bands))
        return scheduler_stats


def _empty_stats(num_bands: int) -> dict[str, Any]:
    """Counts since the last report; under ``bands`` one list per count, an entry per band."""
    ours = ("blocks_freed", "prompt_blocks", "held_blocks", "protected_blocks")
    return {
        "reductions": 0,
        "seconds": 0.0,
        "bands": {name: [0] * num_bands for name in ours},
    }

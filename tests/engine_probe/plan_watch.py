"""Hold an engine against the plan at every step, from the scheduler's and the pool's own tables."""

from collections import Counter
from typing import Any

from engine_probe.engines import Engine
from vllm_spindle.engine.options import request_options
from vllm_spindle.policy import SpindlePolicy

MAX_REPORTED = 10


class PlanWatch:
    """Looks after each ``schedule`` and notes every row that is not as planned.

    What a row should be is computed from the request's own parameters and the pure plan, not
    from any table that the adapters keep.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.policy: SpindlePolicy = engine.managers[0].kv_cache_spec.policy
        self.problems: list[str] = []
        self.counts = {
            "steps": 0,
            "whole_rows": 0,
            "reduced_rows": 0,
            "preemptions": 0,
            "held_steps": 0,
            "resumed_chunks_at_prompt_end": 0,
            "peak_running": 0,
        }
        self._schedule = engine.scheduler.schedule
        engine.scheduler.schedule = self._scheduled

    def __enter__(self) -> "PlanWatch":
        return self

    def __exit__(self, *error: object) -> None:
        self.engine.scheduler.schedule = self._schedule

    def report(self) -> dict[str, Any]:
        """What was seen, as JSON; ``idle_free`` and ``left_over`` are for an idle engine."""
        return {
            "problems": self.problems[:MAX_REPORTED],
            "idle_free": self.engine.is_idle_and_free,
            "left_over": self._left_over(),
            **self.counts,
        }

    def _left_over(self) -> list[str]:
        """Requests that the adapters' own tables still know."""
        scheduler = self.engine.scheduler
        known = [*scheduler._options, *scheduler._reduced, *scheduler._queue.request_ids]
        worker = getattr(self.engine.core.model_executor, "driver_worker", None)
        reduction = getattr(getattr(worker, "worker", None), "_reduction", None)
        if reduction is not None:  # In another process with tensor parallel.
            known += reduction.reducer.holders()
            known += [*reduction._queue.request_ids, *reduction._ends]
            known += [rows for rows in (reduction.stash._rows, reduction._step.window) if rows]
        return known

    def _scheduled(self, *args: Any, **kwargs: Any) -> Any:
        output = self._schedule(*args, **kwargs)
        self.counts["steps"] += 1
        self.counts["preemptions"] += len(output.preempted_req_ids or ())
        running = self.engine.scheduler.running
        self.counts["peak_running"] = max(self.counts["peak_running"], len(running))
        for request in running:
            scheduled = output.num_scheduled_tokens.get(request.request_id, 0)
            self._check_request(request, request.num_computed_tokens - scheduled, scheduled)
        self._check_pool({request.request_id for request in running})
        return output

    def _check_request(self, request: Any, computed: int, scheduled: int) -> None:
        prompt_len = request.num_prompt_tokens
        reduce_at = self.policy.reduce_at(prompt_len)
        if computed < reduce_at < computed + scheduled:
            self._problem(request, f"a chunk of {scheduled} at {computed} crosses {reduce_at}")
        if computed + scheduled == reduce_at and request.num_tokens > reduce_at:
            self.counts["resumed_chunks_at_prompt_end"] += 1
        plans = self.policy.plan_request(prompt_len, request_options(request.sampling_params))
        # Blocks go once the prompt is processed: scheduled a step ahead, that is a step later.
        is_past = request.num_computed_tokens - request.num_in_flight_tokens >= reduce_at
        # Scheduled for nothing once all that it waits for is computed: its reduction goes on.
        is_held = is_past and scheduled == 0 and computed == reduce_at
        self.counts["held_steps"] += is_held
        for manager in self.engine.managers:
            plan = plans[manager.kv_cache_spec.band]
            num_freed = plan.freed_blocks if is_past and not is_held else 0
            num_rows = -(-(computed + scheduled) // manager.block_size)
            expected = [False] * num_rows
            expected[plan.prefix_blocks : plan.prefix_blocks + num_freed] = [True] * num_freed
            blocks = manager.req_to_blocks[request.request_id]
            found = [block.is_null for block in blocks]
            if found != expected:
                self._problem(
                    request,
                    f"band {plan}: {found.count(False)} of {len(found)} blocks held, expected "
                    f"{expected.count(False)} of {len(expected)} (computed {computed})",
                )
            # Beyond the prompt's own blocks a row holds one for each block of generated tokens.
            num_generated = max(0, num_rows - plan.prompt_blocks)
            if is_past and not is_held and found.count(False) - num_generated != plan.held_blocks:
                self._problem(request, f"band {plan}: holds {found.count(False)} of the prompt")
            self.counts["reduced_rows" if num_freed else "whole_rows"] += 1

    def _check_pool(self, running: set[str]) -> None:
        held = Counter(
            block.block_id
            for manager in self.engine.managers
            for blocks in manager.req_to_blocks.values()
            for block in blocks
            if not block.is_null
        )
        for manager in self.engine.managers:
            strangers = {key for key, row in manager.req_to_blocks.items() if row} - running
            if strangers:
                self.problems.append(f"rows of requests that are not running: {strangers}")
        pool = self.engine.pool
        for block_id, num_holders in held.items():
            block = pool.blocks[block_id]
            if num_holders > 1 and block.block_hash is None:
                self.problems.append("a block that the prefix cache does not know is held twice")
            if block.ref_cnt != num_holders:
                self.problems.append(f"a block counts {block.ref_cnt} holders of {num_holders}")
        if pool.get_num_free_blocks() != pool.num_gpu_blocks - 1 - len(held):
            self.problems.append(
                f"{pool.get_num_free_blocks()} blocks free with {len(held)} held of "
                f"{pool.num_gpu_blocks - 1}"
            )

    def _problem(self, request: Any, text: str) -> None:
        self.problems.append(f"{request.request_id} (prompt {request.num_prompt_tokens}): {text}")

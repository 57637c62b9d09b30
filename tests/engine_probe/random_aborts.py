"""Requests that come, go on, and are aborted at any moment, as often at one stage as at another."""

import random
from collections import Counter
from collections.abc import Sequence
from typing import Any

from engine_probe.engines import Ask, Engine


def abort_some(
    running: Engine, asks: Sequence[Ask], *, at_once: int, share: float, rng: random.Random
) -> Counter[str]:
    """Run all, ``at_once`` in the engine; after a share of the steps one of them is aborted.

    Returns:
        How many were aborted at each stage (``stage_of``). The engine is idle then.
    """
    aborted: Counter[str] = Counter()
    requests = running.scheduler.requests
    to_join = [(f"r{index}", ask) for index, ask in enumerate(asks)]
    while to_join or running.engine.has_unfinished_requests():
        while to_join and len(requests) < at_once:
            running.add(*to_join.pop(0))
        running.step()
        if requests and rng.random() < share:
            by_stage: dict[str, list[Any]] = {}
            for request in requests.values():
                by_stage.setdefault(stage_of(running, request), []).append(request)
            stage = min(by_stage, key=lambda each: aborted[each])
            aborted[stage] += 1
            victim = rng.choice(by_stage[stage])
            running.engine.abort_request([victim.request_id], internal=True)
    running.step()  # Let the worker hear of the last ones.
    return aborted


def stage_of(running: Engine, request: Any) -> str:
    """Where a request is between two steps."""
    done = request.num_computed_tokens - request.num_prompt_tokens
    if done < 0:
        return "mid_prefill" if request.num_computed_tokens else "waiting"
    if request.request_id in running.scheduler._queue:
        return "held"
    reduce_after = running.scheduler._policy.reduce_at(0)
    if done < reduce_after:
        return "before_reduction"
    return "prompt_just_ended" if done == reduce_after else "decoding"

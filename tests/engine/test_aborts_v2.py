"""Requests that are cut off at any moment on model runner V2: the plan is held, nothing is left.

Eagerly and in CUDA graphs, as ``engine_probe.graphs`` emulates them, a step ahead or not.
"""

from contextlib import ExitStack
from typing import Any

import pytest

from engine_child import in_child
from engine_probe.interpreted import ENVIRONMENT

pytestmark = pytest.mark.engine

NUM_REQUESTS = 80
MAX_LEN = 256
CHUNK = 64
SIZES = [1, 3, 8, CHUNK]
ON = {"keep_ratio": 0.4, "min_prompt_len": 48, "window": 16}
OPTIONS = {
    "max_num_seqs": 8,
    "max_model_len": MAX_LEN,
    "max_num_batched_tokens": MAX_LEN,
    "dtype": "bfloat16",
}
LITTLE = {"kv_cache_memory_bytes": 512 << 10}
BOTH = {"band_methods": ["evict", "both"]}
# Two layers of a prompt take two steps, and reduced it is behind some of its answer.
WAITS = {"reduce_share": 0.1, "reduce_after": 3}
# name: (spindle's options, in FULL graphs, a step ahead)
MODES: dict[str, tuple[dict[str, Any], bool, bool]] = {
    "eager": (BOTH, False, False),
    "graphs": ({**BOTH, **WAITS}, True, False),
    "graphs, ahead": ({**BOTH, **WAITS}, True, True),
}
STAGES = ("waiting", "mid_prefill", "prompt_just_ended", "before_reduction", "held", "decoding")


def cut_off(model: str) -> dict[str, Any]:
    """Per mode: what the plan's watch saw, who was cut off when, and who said what."""
    from engine_probe.interpreted import enable

    enable()
    return {name: _cut_off(model, *mode) for name, mode in MODES.items()}


def _cut_off(model: str, spindle: dict[str, Any], with_graphs: bool, ahead: bool) -> dict[str, Any]:
    import random

    import tiny
    from engine_probe.engines import Ask, engine
    from engine_probe.graphs import full_graphs
    from engine_probe.interpreted import async_scheduling
    from engine_probe.plan_watch import PlanWatch
    from engine_probe.random_aborts import abort_some

    rng = random.Random(5)
    short, long = range(1, 48), range(64, 160)
    lengths = [rng.choice(rng.choice((short, long, long))) for _ in range(NUM_REQUESTS)]
    prompts = tiny.prompts(NUM_REQUESTS, lengths, seed=6)
    asks = [
        Ask(each["prompt_token_ids"], rng.randrange(3, 12), rng.choice((None, None, 0.2, 1.0)))
        for each in prompts
    ]
    with ExitStack() as stack:
        if ahead:
            stack.enter_context(async_scheduling())
        replays = stack.enter_context(full_graphs("FULL", SIZES)) if with_graphs else {}
        running = stack.enter_context(engine(model, {**ON, **spindle}, **OPTIONS, **LITTLE))
        watch = PlanWatch(running)
        running.chunk(CHUNK)
        aborted = abort_some(running, asks, at_once=12, share=0.5, rng=rng)
        return {**watch.report(), "aborted": aborted, "replays": sum(replays.values())}


@pytest.fixture(scope="module")
def found(small_llama: str) -> dict[str, Any]:
    """See ``cut_off``."""
    return in_child(cut_off, env=ENVIRONMENT, imports_vllm_itself=True, model=small_llama)


@pytest.mark.parametrize("mode", MODES)
def test_the_plan_is_held(found: dict[str, Any], mode: str) -> None:
    """At every step; when idle every block is free, and the adapters know nobody."""
    run = found[mode]
    assert run["problems"] == []
    assert run["idle_free"]
    assert run["left_over"] == []
    assert run["reduced_rows"] > 40
    assert (run["replays"] > 30) == MODES[mode][1]


@pytest.mark.parametrize("mode", MODES)
def test_they_were_cut_off_at_every_stage(found: dict[str, Any], mode: str) -> None:
    """Waiting, under way, at the prompt's end, until the reduction and in it, and after."""
    waits = {"before_reduction", "held"}
    stages = [
        each for each in STAGES if each not in waits or WAITS.items() <= MODES[mode][0].items()
    ]
    assert all(found[mode]["aborted"][stage] >= 3 for stage in stages), found[mode]["aborted"]

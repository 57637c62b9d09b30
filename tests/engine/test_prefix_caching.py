"""Prefix caching stays on: shared prompts are found again, and what is shared is never written."""

from dataclasses import replace
from typing import Any

import pytest

from engine_child import in_child

pytestmark = pytest.mark.engine

NUM_REQUESTS = 200
SPINDLE = {"keep_ratio": 0.25}


def on_and_off(model: str) -> dict[str, Any]:
    """The same requests with the cache and without, whole, in chunks, preempted, with codebooks."""
    from engine_probe.engines import engine
    from engine_probe.plan_watch import PlanWatch
    from engine_probe.shared_prompts import Checker, answered, requests

    asks, found = requests(NUM_REQUESTS), {}
    exact = {"dtype": "float32", "max_num_seqs": 16}
    with engine(model, SPINDLE, **exact) as running:
        found["off"], _ = answered(running, asks, aborts=False)
    runs = {
        "whole": exact,
        "chunks": {**exact, "max_num_batched_tokens": 200},
        "little memory": {**exact, "kv_cache_memory_bytes": 4608 << 10, "max_model_len": 1216},
    }
    for name, options in runs.items():
        with engine(model, SPINDLE, enable_prefix_caching=True, **options) as running:
            checker = Checker(running)
            with PlanWatch(running) as watch:
                tokens, cached = answered(running, asks, aborts=name != "whole")
                report = watch.report()
            report |= {"checked": checker.num_checked, "written_shared": checker.problems}
            found[name] = {"tokens": tokens, "cached": cached, **report}
    merging = {**SPINDLE, "method": "both", "window": 32}
    with engine(model, merging, enable_prefix_caching=True, max_num_seqs=16) as running:
        checker = Checker(running)
        _, cached = answered(running, asks[:60], aborts=True)
        found["codebooks"] = {"cached": cached, "written_shared": checker.problems}
    with engine(model, None, enable_prefix_caching=True, **exact) as running:
        stock = [replace(ask, keep_ratio=None) for ask in asks]
        _, found["stock_cached"] = answered(running, stock, aborts=False)
    return found


def without_the_cap(model: str) -> dict[str, int]:
    """What the checker says once blocks are hashed as in stock vLLM."""
    from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager

    from engine_probe.engines import engine
    from engine_probe.shared_prompts import Checker, answered, requests
    from vllm_spindle.engine.manager import SpindleManager

    SpindleManager.cache_blocks = FullAttentionManager.cache_blocks
    options = {"enable_prefix_caching": True, "dtype": "float32", "max_num_seqs": 16}
    with engine(model, SPINDLE, **options) as running:
        checker = Checker(running)
        answered(running, requests(30), aborts=False)
    return {"checked": checker.num_checked, "written_shared": checker.problems}


@pytest.fixture(scope="module")
def found(llama: str) -> dict[str, Any]:
    """Every run."""
    return in_child(on_and_off, model=llama)


@pytest.mark.parametrize("run", ["whole", "chunks", "little memory"])
def test_same_tokens_as_without_a_cache(found: dict[str, Any], run: str) -> None:
    """Token for token, for every request that was not aborted."""
    tokens = found[run]["tokens"]
    assert len(tokens) == NUM_REQUESTS if run == "whole" else len(tokens) > NUM_REQUESTS // 2
    assert {i: found["off"][i] for i in tokens} == tokens


@pytest.mark.parametrize("run", ["whole", "chunks", "little memory", "codebooks"])
def test_no_shared_block_is_written(found: dict[str, Any], run: str) -> None:
    """On every reduction: no hash, one owner."""
    assert found[run]["written_shared"] == 0
    assert found[run]["cached"] > 0


@pytest.mark.parametrize("run", ["whole", "chunks", "little memory"])
def test_plan_is_held_with_shared_blocks(found: dict[str, Any], run: str) -> None:
    """At every step, and nothing is left at the end."""
    assert found[run]["problems"] == []
    assert found[run]["idle_free"]
    assert found[run]["left_over"] == []
    assert found[run]["checked"] > 1000
    assert found["little memory"]["preemptions"] > 0


def test_most_of_stocks_hits_remain(found: dict[str, Any]) -> None:
    """The shallowest band's region bounds a hit; most of a shared prefix lies before it."""
    assert found["whole"]["cached"] > 0.5 * found["stock_cached"] > 0


def test_the_checker_sees_a_missing_cap(llama: str) -> None:
    """It would say so, were blocks hashed as in stock vLLM."""
    said = in_child(without_the_cap, model=llama)
    assert said["checked"] > 0
    assert said["written_shared"] > 0

"""Model runner V2, its kernels interpreted on the CPU: V1's tokens, the plan held, nothing left.

Eagerly, and with FULL CUDA graphs emulated (``engine_probe.graphs``).
"""

from contextlib import ExitStack
from typing import Any

import pytest

import tiny
from engine_child import in_child
from engine_probe.interpreted import ENVIRONMENT

pytestmark = pytest.mark.engine

EXACT = {"dtype": "float32"}
ON = {"keep_ratio": 0.25}
PROMPT_LENS = [500, 257, 95, 513]
# The second and the last prompt end in a chunk of one token.
CHUNK = 256
LITTLE = {"kv_cache_memory_bytes": 1152 << 10, "max_model_len": 704, "max_num_seqs": 8}
LONG = 100  # more tokens for each answer, where memory is little
MODES: dict[str, tuple[dict[str, Any] | None, dict[str, Any]]] = {
    "not asked": (None, {}),
    "ratio 1": ({"keep_ratio": 1.0}, {}),
    "evict": (ON, {}),
    "async": (ON, {}),
    "one at a time": ({**ON, "reduce_share": 0.1}, {}),
    "waits": ({**ON, "reduce_after": 4}, {}),
    "waits, async": ({**ON, "reduce_after": 4}, {}),
    "unfold": ({**ON, "gqa": "unfold", "budget": "uniform"}, {}),
    "codebooks": ({**ON, "method": "both"}, {"dtype": "bfloat16"}),
    "prefix, no cache": ({**ON, "protected_prefix_tokens": 96}, {}),
    "prefix": ({**ON, "protected_prefix_tokens": 96}, {"enable_prefix_caching": True}),
    "preempted": (ON, LITTLE),
}
# Requests over shared prefixes, eagerly.
SHARING: dict[str, dict[str, Any]] = {
    "1.0": {"keep_ratio": 1.0},
    "0.5": {"keep_ratio": 0.5},
    "0.25": ON,
    "heads": {**ON, "head_shares": tiny.head_shares(num_layers=3, num_heads=2)},
}
NUM_SHARING = 24


def served(model: str, version: int, with_graphs: bool = False) -> dict[str, Any]:
    """Per mode: tokens of a batch that mixes prompts under way with reduced ones, aborts beside."""
    from dataclasses import replace

    from engine_probe.interpreted import async_scheduling, enable

    if version == 2:
        enable()
    from engine_probe.engines import Ask, engine
    from engine_probe.graphs import full_graphs
    from engine_probe.plan_watch import PlanWatch

    prompts = [each["prompt_token_ids"] for each in tiny.prompts(8, PROMPT_LENS, seed=1)]
    prompts[4][:96] = prompts[0][:96]
    asks = [Ask(prompt, max_tokens=6 + 3 * i) for i, prompt in enumerate(prompts)]
    found: dict[str, Any] = {}
    for name, (spindle, options) in MODES.items():
        with ExitStack() as stack:
            if version == 2 and name.endswith("async"):
                stack.enter_context(async_scheduling())
            graphs = stack.enter_context(full_graphs()) if with_graphs else {}
            running = stack.enter_context(engine(model, spindle, **{**EXACT, **options}))
            running.chunk(CHUNK)
            runner = running.core.model_executor.driver_worker.worker.model_runner
            found[name] = {
                "is_v2": hasattr(runner, "req_states"),
                "scheduler": running.describe()["scheduler"],
            }
            if spindle is None or spindle["keep_ratio"] == 1:
                found[name]["tokens"] = running.run(asks)
                found[name]["replays"] = sum(graphs.values())
                continue
            with PlanWatch(running) as watch:
                running.add("gone", asks[0])
                running.step()
                running.step()
                running.engine.abort_request(["gone"])
                more = LONG if name in ("preempted", "evict") else 0
                tokens = running.run(
                    [replace(ask, max_tokens=ask.max_tokens + more) for ask in asks]
                )
                found[name] |= {"tokens": tokens, **watch.report()}
            found[name]["stats"] = running.scheduler._stats["reductions"]
            found[name]["replays"] = sum(graphs.values())
    return found


def last_chunks(model: str) -> dict[str, Any]:
    """Tokens after prompts that end in a chunk of one token, one prompt at a time.

    Eagerly; in FULL graphs; with graphs that take whole chunks, too; and in FULL graphs by two
    mistakes that the bench must see: buffers that are new every step, and a window that is taken
    only if the step asks for it.
    """
    from contextlib import nullcontext
    from unittest.mock import patch

    from engine_probe.interpreted import enable

    enable()
    from engine_probe.engines import Ask, engine
    from engine_probe.graphs import full_graphs
    from vllm_spindle.engine.shifted_table import ShiftedTable
    from vllm_spindle.engine.window import WindowStash

    buffers, record = ShiftedTable._buffers, WindowStash.record

    def new_buffers(table: Any, *like: Any) -> Any:
        return tuple(each.clone() for each in buffers(table, *like))

    def record_if_asked(stash: Any, layer_idx: int, queries: Any) -> None:
        if stash._rows is not None:
            record(stash, layer_idx, queries)

    runs = {
        "eager": (nullcontext(), nullcontext({})),
        "graphs": (nullcontext(), full_graphs()),
        "mixed": (nullcontext(), full_graphs("FULL", [1, 4, 64])),
        "new buffers": (patch.object(ShiftedTable, "_buffers", new_buffers), full_graphs()),
        "only if asked": (patch.object(WindowStash, "record", record_if_asked), full_graphs()),
    }
    prompts = [each["prompt_token_ids"] for each in tiny.prompts(3, [257, 129, 321], seed=3)]
    found = {}
    for name, (mistake, graphs) in runs.items():
        with mistake, graphs as replays, engine(model, ON, **EXACT) as running:
            running.chunk(64)
            tokens = [running.run([Ask(prompt, max_tokens=9)])[0] for prompt in prompts]
            found[name] = {"tokens": tokens, "replays": {str(k): n for k, n in replays.items()}}
    return found


@pytest.fixture(scope="module")
def versions(thin_llama: str) -> dict[str, Any]:
    """Both runners, each in a process of its own."""
    return {
        "v1": in_child(served, model=thin_llama, version=1),
        "v2": in_child(
            served, env=ENVIRONMENT, imports_vllm_itself=True, model=thin_llama, version=2
        ),
        "graphs": in_child(
            served,
            env=ENVIRONMENT,
            imports_vllm_itself=True,
            model=thin_llama,
            version=2,
            with_graphs=True,
        ),
    }


@pytest.fixture(scope="module")
def ends(thin_llama: str) -> dict[str, Any]:
    """See ``last_chunks``."""
    return in_child(last_chunks, env=ENVIRONMENT, imports_vllm_itself=True, model=thin_llama)


@pytest.mark.parametrize("mode", MODES)
def test_same_tokens_as_v1(versions: dict[str, Any], mode: str) -> None:
    """Token for token, reduced or not."""
    assert versions["v2"][mode]["is_v2"] and not versions["v1"][mode]["is_v2"]
    assert versions["v2"][mode]["tokens"] == versions["v1"][mode]["tokens"]


def sharing(model: str, version: int) -> dict[str, Any]:
    """Requests over five prefixes at three ratios; V2 with a prefix cache, and aborts."""
    from dataclasses import replace

    from engine_probe.interpreted import enable

    if version == 2:
        enable()
    from engine_probe.engines import engine
    from engine_probe.plan_watch import PlanWatch
    from engine_probe.shared_prompts import Checker, answered, requests

    asks = [replace(ask, max_tokens=2 + ask.max_tokens % 4) for ask in requests(NUM_SHARING)]
    options = {**EXACT, "max_num_seqs": 16, "enable_prefix_caching": version == 2}
    found: dict[str, Any] = {}
    for name, spindle in SHARING.items():
        is_on = spindle["keep_ratio"] < 1
        own = asks if is_on else [replace(ask, keep_ratio=None) for ask in asks]
        with engine(model, spindle, **options) as running:
            seen = (Checker(running), PlanWatch(running)) if is_on else ()
            tokens, cached = answered(running, own, aborts=version == 2)
            found[name] = {"tokens": tokens, "cached": cached}
            found[name]["idle_free"] = running.is_idle_and_free
            if seen:
                found[name] |= {"checked": seen[0].num_checked, "shared": seen[0].problems}
                found[name] |= seen[1].report()
    return found


@pytest.fixture(scope="module")
def shared(thin_llama: str) -> dict[str, Any]:
    """See ``sharing``."""
    return {
        "off": in_child(sharing, model=thin_llama, version=1),
        "on": in_child(
            sharing, env=ENVIRONMENT, imports_vllm_itself=True, model=thin_llama, version=2
        ),
    }


@pytest.mark.parametrize("run", SHARING)
def test_shared_prefixes_are_hit_and_change_nothing(shared: dict[str, Any], run: str) -> None:
    """Token for token, for every request that was not aborted."""
    off, on = shared["off"][run], shared["on"][run]
    assert {i: off["tokens"][i] for i in on["tokens"]} == on["tokens"]
    assert NUM_SHARING // 2 < len(on["tokens"]) < NUM_SHARING == len(off["tokens"])
    assert on["cached"] > 0 == off["cached"]
    assert on["idle_free"]


@pytest.mark.parametrize("run", [name for name in SHARING if name != "1.0"])
def test_no_shared_block_is_written(shared: dict[str, Any], run: str) -> None:
    """At every reduction; the plan is held, and nothing is left."""
    on = shared["on"][run]
    assert on["shared"] == 0 < on["checked"]
    assert on["problems"] == on["left_over"] == []


@pytest.mark.parametrize("mode", MODES)
def test_same_tokens_in_full_graphs(versions: dict[str, Any], mode: str) -> None:
    """Token for token, reduced or not; nearly every step of decoding is a replay."""
    graphs = versions["graphs"][mode]
    assert graphs["tokens"] == versions["v2"][mode]["tokens"]
    assert graphs["replays"] > 15 and versions["v2"][mode]["replays"] == 0


def test_a_last_chunk_of_one_token_in_a_full_graph(ends: dict[str, Any]) -> None:
    """Its prompt is reduced as ever: three ends and 8 steps of decoding each ran as replays."""
    assert ends["graphs"]["replays"] == {"1": 3 + 3 * 8}
    assert ends["graphs"]["tokens"] == ends["eager"]["tokens"]


def test_whole_chunks_in_full_graphs(ends: dict[str, Any]) -> None:
    """Windows that a replayed prefill left behind, beside those of a single token."""
    assert ends["mixed"]["replays"] == {"64": 4 + 2 + 5, "1": 3 + 3 * 8}
    assert ends["mixed"]["tokens"] == ends["eager"]["tokens"]


@pytest.mark.parametrize("mistake", ["new buffers", "only if asked"])
def test_the_bench_sees_what_is_stale(ends: dict[str, Any], mistake: str) -> None:
    """Mistakes that a graph would punish give other tokens."""
    assert ends[mistake]["tokens"] != ends["eager"]["tokens"]


def test_off_is_stock(versions: dict[str, Any]) -> None:
    """Ratio 1.0 is as if not asked; a quarter is not: the comparison can tell."""
    v2 = versions["v2"]
    assert v2["ratio 1"]["tokens"] == v2["not asked"]["tokens"] != v2["evict"]["tokens"]
    graphs = versions["graphs"]
    assert graphs["ratio 1"]["replays"] == graphs["not asked"]["replays"]


@pytest.mark.parametrize("mode", [name for name in MODES if name not in ("not asked", "ratio 1")])
def test_plan_is_held(versions: dict[str, Any], mode: str) -> None:
    """At every step; when idle every block is free, and the adapters know nobody."""
    for found in (each[mode] for each in versions.values()):
        assert found["problems"] == []
        assert found["idle_free"]
        assert found["left_over"] == []
        assert found["stats"] >= 6
    assert ("Async" in versions["v2"][mode]["scheduler"]) == mode.endswith("async")


def test_the_cache_changes_nothing(versions: dict[str, Any]) -> None:
    """A protected prefix found in the cache, or computed."""
    v2 = versions["v2"]
    assert v2["prefix"]["tokens"] == v2["prefix, no cache"]["tokens"] != v2["evict"]["tokens"]


def test_preempted_requests_say_the_same(versions: dict[str, Any]) -> None:
    """With little memory as with plenty."""
    assert versions["v2"]["preempted"]["preemptions"] > 0
    assert versions["v2"]["preempted"]["tokens"] == versions["v2"]["evict"]["tokens"]

"""A protected prefix: whole in every band, shared, found by itself; answers as without a cache."""

from typing import Any

import pytest

from engine_child import in_child

pytestmark = pytest.mark.engine

SPINDLE = {"keep_ratio": 0.25}
EXACT = {"dtype": "float32", "max_num_seqs": 16}
NUM_REQUESTS = 80
SYSTEM = 400
TURNS = 6
BLOCK = 32


def protected(model: str) -> dict[str, Any]:
    """Requests that name their prefix, with the cache and without, then one that finds it."""
    from engine_probe.engines import engine
    from engine_probe.plan_watch import PlanWatch
    from engine_probe.shared_prompts import Checker, answered, requests

    asks, found = requests(NUM_REQUESTS, is_protected=True), {}
    plain = requests(NUM_REQUESTS)
    with engine(model, SPINDLE, **EXACT) as running:
        found["off"], _ = answered(running, asks, aborts=False)
    runs = {
        "named": (SPINDLE, asks, EXACT),
        "chunks": (SPINDLE, asks, {**EXACT, "max_num_batched_tokens": 200}),
        "little memory": (
            SPINDLE,
            asks,
            {**EXACT, "kv_cache_memory_bytes": 4608 << 10, "max_model_len": 1216},
        ),
        "auto": ({**SPINDLE, "protected_prefix_tokens": "auto"}, plain, EXACT),
        "codebooks": ({**SPINDLE, "method": "both", "window": 32}, asks, {"max_num_seqs": 16}),
    }
    for name, (spindle, these, options) in runs.items():
        with engine(model, spindle, enable_prefix_caching=True, **options) as running:
            checker = Checker(running)
            with PlanWatch(running) as watch:
                tokens, cached = answered(running, these, aborts=name != "named")
                report = watch.report()
            report |= {"checked": checker.num_checked, "written_shared": checker.problems}
            blocks = running.scheduler._stats["bands"]["protected_blocks"]
            found[name] = {"tokens": tokens, "cached": cached, "blocks": blocks, **report}
    with engine(model, SPINDLE, enable_prefix_caching=True, **EXACT) as running:
        _, found["unprotected_cached"] = answered(running, plain, aborts=False)
        found["chat"] = _chat(running)
        found["samples"] = _samples(running)
    with engine(model, SPINDLE, **EXACT) as running:
        found["chat_off"] = _chat(running)
        found["samples_off"] = _samples(running)
    return found


def _chat(running: Any) -> list[dict[str, Any]]:
    """Six turns over a protected system prompt, each upon the answers of those before."""
    import tiny
    from engine_probe.engines import Ask

    prompt = list(tiny.prompts(1, [SYSTEM], seed=50)[0]["prompt_token_ids"])
    turns = []
    for turn in range(TURNS):
        prompt += tiny.prompts(1, [90], seed=60 + turn)[0]["prompt_token_ids"]
        running.add(f"turn{turn}", Ask(prompt, 30, protected=SYSTEM))
        done = running.drain()[f"turn{turn}"]
        answer = list(done.outputs[0].token_ids)
        turns.append({"answer": answer, "cached": done.num_cached_tokens})
        prompt = prompt + answer
    return turns


def _samples(running: Any) -> list[list[int]]:
    """Three samples of one prompt, which share its blocks."""
    import tiny
    from engine_probe.engines import Ask

    (prompt,) = tiny.prompts(1, [900], seed=70)
    fields = {"n": 3, "temperature": 1.0, "top_k": 1}
    running.add("samples", Ask(prompt["prompt_token_ids"], 20, protected=500, fields=fields))
    return [list(sample.token_ids) for sample in running.drain()["samples"].outputs]


def on_ranks(model: str) -> dict[str, Any]:
    """Prefixes found by the scheduler reach every worker: one rank and two."""
    from engine_probe.engines import engine
    from engine_probe.shared_prompts import answered, requests

    found = {}
    # Two ranks first: a one-rank engine binds its very process to its cores.
    for ranks in (2, 1):
        options = {"tensor_parallel_size": ranks, "enable_prefix_caching": True, **EXACT}
        if ranks > 1:
            options["distributed_executor_backend"] = "mp"
        auto = {**SPINDLE, "protected_prefix_tokens": "auto"}
        with engine(model, auto, **options) as running:
            tokens, cached = answered(running, requests(40), aborts=False)
            blocks = running.scheduler._stats["bands"]["protected_blocks"]
            found[str(ranks)] = {"tokens": tokens, "cached": cached, "blocks": blocks}
    return found


@pytest.fixture(scope="module")
def found(llama: str) -> dict[str, Any]:
    """Every run."""
    return in_child(protected, model=llama)


@pytest.mark.parametrize("run", ["named", "chunks", "little memory"])
def test_same_tokens_as_without_a_cache(found: dict[str, Any], run: str) -> None:
    """Token for token, for every request that was not aborted."""
    tokens = found[run]["tokens"]
    assert len(tokens) == NUM_REQUESTS if run == "named" else len(tokens) > NUM_REQUESTS // 4
    assert {i: found["off"][i] for i in tokens} == tokens


@pytest.mark.parametrize("run", ["named", "chunks", "little memory", "auto", "codebooks"])
def test_plan_is_held_and_nothing_shared_is_written(found: dict[str, Any], run: str) -> None:
    """At every step and every reduction, and nothing is left at the end."""
    assert found[run]["problems"] == []
    assert found[run]["idle_free"]
    assert found[run]["left_over"] == []
    assert found[run]["written_shared"] == 0 < found[run]["checked"]
    assert min(found[run]["blocks"]) > 0
    assert found["little memory"]["preemptions"] > 0


def test_a_protected_prefix_is_hit_whole(found: dict[str, Any]) -> None:
    """More than without protection, where the shallowest band's region cuts a hit short."""
    assert found["named"]["cached"] > found["unprotected_cached"] > 0


def test_every_turn_of_a_chat_finds_the_prefix(found: dict[str, Any]) -> None:
    """From the second turn on at least its whole blocks, and the answers are the uncached ones."""
    turns = found["chat"]
    assert all(turn["cached"] >= SYSTEM // BLOCK * BLOCK for turn in turns[1:])
    assert [turn["answer"] for turn in turns] == [turn["answer"] for turn in found["chat_off"]]
    assert {turn["cached"] for turn in found["chat_off"]} == {0}


def test_samples_of_a_prompt_share_it(found: dict[str, Any]) -> None:
    """n = 3, all greedy: each the same, and the same as without the cache."""
    assert found["samples"] == found["samples_off"]
    assert found["samples"][0] == found["samples"][1] == found["samples"][2]


def test_ranks_agree_on_what_recurs(llama: str) -> None:
    """Two workers plan with the scheduler's find, as one does."""
    ranks = in_child(on_ranks, env={"VLLM_CPU_OMP_THREADS_BIND": "0|1"}, model=llama)
    assert ranks["1"] == ranks["2"]
    assert min(ranks["1"]["blocks"]) > 0

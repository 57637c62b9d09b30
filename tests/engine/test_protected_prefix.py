"""A protected prefix: whole in every band, shared, found by itself; answers as without a cache."""

from typing import Any

import pytest

import tiny
from engine_child import in_child

pytestmark = pytest.mark.engine

SPINDLE = {"keep_ratio": 0.25}
EXACT = {"dtype": "float32", "max_num_seqs": 16}
NUM_REQUESTS = 80
SYSTEM = 400
NUM_SHARING, SHARED, OWN = 64, 1000, 500
TURNS = 6
BLOCK = 32
AUTO = {**SPINDLE, "protected_prefix_tokens": "auto"}
HEADS = {**SPINDLE, "head_shares": tiny.head_shares(num_layers=3, num_heads=2)}
# Two ranks first: a one-rank engine binds its very process to its cores.
RANKS: dict[str, tuple[int, dict[str, Any], bool]] = {
    "2": (2, AUTO, True),
    "heads": (2, HEADS, True),
    "heads, no cache": (2, HEADS, False),
    "1": (1, AUTO, True),
}


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
            {**EXACT, "kv_cache_memory_bytes": 2304 << 10, "max_model_len": 1216},
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
        checker = Checker(running)
        _, found["unprotected_cached"] = answered(running, plain, aborts=False)
        found["chat"] = _chat(running)
        found["samples"] = _samples(running)
        found["written_shared"] = checker.problems
    with engine(model, SPINDLE, **EXACT) as running:
        found["chat_off"] = _chat(running)
        found["samples_off"] = _samples(running)
    return found


def _chat(running: Any) -> list[dict[str, Any]]:
    """Six turns over a protected system prompt, each upon the answers of those before."""
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


def _samples(running: Any) -> dict[str, Any]:
    """Three samples of one prompt, which share its blocks; cached tokens of each, and planned."""
    from unittest.mock import patch

    from engine_probe.engines import Ask
    from vllm_spindle.config import RequestOptions

    (prompt,) = tiny.prompts(1, [900], seed=70)
    fields = {"n": 3, "temperature": 1.0, "top_k": 1}
    look_up, cached = running.scheduler._get_local_prefix_cache_hit, []

    def looking_up(request: Any) -> Any:
        hit = look_up(request)
        cached.append(hit[1])
        return hit

    with patch.object(running.scheduler, "_get_local_prefix_cache_hit", looking_up):
        running.add("samples", Ask(prompt["prompt_token_ids"], 20, protected=500, fields=fields))
        samples = running.drain()["samples"].outputs
    policy = running.managers[0].kv_cache_spec.policy
    return {
        "tokens": [list(sample.token_ids) for sample in samples],
        "cached": cached,
        "planned": min(policy.shareable(900, RequestOptions(None, 500))) * BLOCK,
    }


def on_ranks(model: str) -> dict[str, Any]:
    """Prefixes found by the scheduler reach every worker; measured budgets, hit or not."""
    from engine_probe.engines import engine
    from engine_probe.shared_prompts import answered, requests

    found = {}
    for name, (ranks, spindle, is_caching) in RANKS.items():
        options = {"tensor_parallel_size": ranks, "enable_prefix_caching": is_caching, **EXACT}
        if ranks > 1:
            options["distributed_executor_backend"] = "mp"
        with engine(model, spindle, **options) as running:
            tokens, cached = answered(running, requests(40), aborts=False)
            blocks = running.scheduler._stats["bands"]["protected_blocks"]
            found[name] = {"tokens": tokens, "cached": cached, "blocks": blocks}
    return found


def sharing(model: str) -> dict[str, dict[str, int]]:
    """64 requests at once behind one start that they name, stock and spindle in the same memory."""
    from engine_probe.engines import Ask, engine

    start, *ends = (
        prompt["prompt_token_ids"]
        for prompt in tiny.prompts(1 + NUM_SHARING, [SHARED] + [OWN] * NUM_SHARING, seed=80)
    )
    options = {**EXACT, "kv_cache_memory_bytes": 8 << 20, "max_num_seqs": NUM_SHARING}
    found = {}
    for name, spindle, protected in (("stock", None, None), ("spindle", SPINDLE, SHARED)):
        with engine(model, spindle, enable_prefix_caching=True, **options) as running:
            for index, end in enumerate(ends):
                running.add(f"r{index}", Ask(start + end, 32, protected=protected))
            peak, cached = 0, 0
            while running.engine.has_unfinished_requests():
                cached += sum(out.num_cached_tokens for out in running.step() if out.finished)
                peak = max(peak, len(running.scheduler.running))
        found[name] = {"peak": peak, "cached": cached}
    return found


@pytest.fixture(scope="module")
def found(thin_llama: str) -> dict[str, Any]:
    """Every run."""
    return in_child(protected, model=thin_llama)


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


def test_a_named_start_is_shared_as_in_stock_and_more_run(small_llama: str) -> None:
    """At least 90 % of stock's hit tokens, and 2.5 times as many at once."""
    counts = in_child(sharing, model=small_llama)
    stock, spindle = counts["stock"], counts["spindle"]
    assert spindle["cached"] >= 0.9 * stock["cached"] > 0
    assert spindle["peak"] >= 2.5 * stock["peak"] > 0


def test_every_turn_of_a_chat_finds_the_prefix(found: dict[str, Any]) -> None:
    """From the second turn on at least its whole blocks, and the answers are the uncached ones."""
    turns = found["chat"]
    assert all(turn["cached"] >= SYSTEM // BLOCK * BLOCK for turn in turns[1:])
    assert [turn["answer"] for turn in turns] == [turn["answer"] for turn in found["chat_off"]]
    assert {turn["cached"] for turn in found["chat_off"]} == {0}


def test_samples_of_a_prompt_share_it(found: dict[str, Any]) -> None:
    """n = 3, all greedy: each the same, and as without the cache; the first computes for all."""
    samples, off = found["samples"], found["samples_off"]
    assert samples["tokens"] == off["tokens"]
    assert samples["tokens"][0] == samples["tokens"][1] == samples["tokens"][2]
    assert samples["cached"] == [0, samples["planned"], samples["planned"]]
    assert samples["planned"] >= 500 // BLOCK * BLOCK
    assert off["cached"] == [0, 0, 0]
    assert found["written_shared"] == 0


@pytest.fixture(scope="module")
def ranks(thin_llama: str) -> dict[str, Any]:
    """See ``on_ranks``."""
    return in_child(on_ranks, env={"VLLM_CPU_OMP_THREADS_BIND": "0|1"}, model=thin_llama)


def test_ranks_agree_on_what_recurs(ranks: dict[str, Any]) -> None:
    """Two workers plan with the scheduler's find, as one does."""
    assert ranks["1"] == ranks["2"]
    assert min(ranks["1"]["blocks"]) > 0


def test_measured_budgets_on_two_ranks_are_as_without_a_cache(ranks: dict[str, Any]) -> None:
    """Token for token. (Not those of one rank: a head's blocks come from its own rank's.)"""
    on, off = ranks["heads"], ranks["heads, no cache"]
    assert on["tokens"] == off["tokens"] != ranks["2"]["tokens"]
    assert on["cached"] > 0 == off["cached"]

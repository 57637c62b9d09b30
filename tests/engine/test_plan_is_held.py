"""Plan is held: blocks after prefill equal the plan at every step, and none is ever lost."""

from typing import Any

import pytest

import tiny
from engine_child import in_child

pytestmark = pytest.mark.engine

MIB = 1 << 20
MAX_LEN = 2048
STAGES = ("waiting", "mid_prefill", "prompt_just_ended", "decoding")  # of every mode
MODES: dict[str, dict[str, Any]] = {
    "union": {},
    "unfold": {"gqa": "unfold"},
    "codebooks": {"band_methods": ["merge", "both"]},
    "heads": {"num_bands": 2, "head_shares": tiny.head_shares(num_layers=2, num_heads=2)},
    # A prompt's layers take several steps.
    "paced": {"band_methods": ["both", "evict"], "reduce_share": 0.1},
    # Reduced behind some of the answer.
    "waits": {"band_methods": ["both", "evict"], "reduce_share": 0.1, "reduce_after": 6},
}


def held(model: str) -> dict[str, Any]:
    """Runs of ever changing requests, each watched at every step."""
    found = {}
    for name, mode in MODES.items():
        found[f"aborts-{name}"] = _aborts(model, mode)
    found["preemption"] = _preemption(model)
    found["thousand"] = _thousand(model)
    return found


def _aborts(model: str, mode: dict[str, Any]) -> dict[str, Any]:
    """64 at once in chunks of 300, any ratio, aborted at any moment, in little memory."""
    import random

    from engine_probe.engines import Ask, engine
    from engine_probe.plan_watch import PlanWatch
    from engine_probe.random_aborts import abort_some

    rng = random.Random(3)
    ratios = [None, None, 0.1, 0.3, 0.5, 0.8, 1.0]
    lengths = [rng.randrange(1, 1500) for _ in range(96)]
    prompts = tiny.prompts(len(lengths), lengths, seed=4)
    asks = [
        Ask(prompt["prompt_token_ids"], rng.randrange(1, 48), keep_ratio=rng.choice(ratios))
        for prompt in prompts
    ]
    options = {"max_num_seqs": 64, "max_model_len": MAX_LEN, "max_num_batched_tokens": MAX_LEN}
    spindle = {"keep_ratio": 0.25, **mode}
    with engine(model, spindle, kv_cache_memory_bytes=12 * MIB, **options) as running:
        watch = PlanWatch(running)
        running.chunk(300)
        aborted = abort_some(running, asks, at_once=64, share=0.2, rng=rng)
        return {**watch.report(), "aborted": aborted}


def _preemption(model: str) -> dict[str, Any]:
    """Prompts that fit and outputs that then do not: requests are preempted and resumed."""
    from engine_probe.engines import Ask, engine
    from engine_probe.plan_watch import PlanWatch

    prompts = tiny.prompts(12, [700, 333, 1024, 901], seed=5)
    asks = [Ask(prompt["prompt_token_ids"], 300) for prompt in prompts]
    options = {"max_model_len": MAX_LEN, "max_num_batched_tokens": MAX_LEN}
    answers: dict[str, Any] = {}
    sides = {
        "stock": None,
        "spindle": {"keep_ratio": 0.25},
        "codebooks": {"keep_ratio": 0.25, **MODES["codebooks"]},
        "heads": {"keep_ratio": 0.25, **MODES["heads"]},
        "paced": {"keep_ratio": 0.25, **MODES["paced"]},
        "waits": {"keep_ratio": 0.25, **MODES["waits"]},
    }
    for name, spindle in sides.items():
        for memory in (64 * MIB, 2 * MIB):
            with engine(model, spindle, kv_cache_memory_bytes=memory, **options) as running:
                watch = PlanWatch(running) if spindle else None
                preempted = _count_preemptions(running)
                tokens = running.run(asks)
                answers[f"{name}-{memory // MIB}"] = {
                    "tokens": tokens,
                    "preempted": len(preempted),
                    "watch": watch.report() if watch else None,
                }
    return answers


def _count_preemptions(running: Any) -> list[str]:
    preempted: list[str] = []
    preempt = running.scheduler._preempt_request

    def counted(request: Any, *args: Any, **kwargs: Any) -> None:
        preempted.append(request.request_id)
        preempt(request, *args, **kwargs)

    running.scheduler._preempt_request = counted
    return preempted


def _thousand(model: str) -> dict[str, Any]:
    """1,000 requests from one token to the model's maximum, short ones more often."""
    import random

    from engine_probe.engines import Ask, engine
    from engine_probe.plan_watch import PlanWatch

    rng = random.Random(6)
    longest = MAX_LEN - 4
    lengths = [1, 2, 31, 32, 33, 63, 64, 65, 127, 128, 129, longest, longest]
    lengths += [1 + int((longest - 1) * rng.random() ** 6) for _ in range(1000 - len(lengths))]
    prompts = tiny.prompts(len(lengths), lengths, seed=7)
    asks = [Ask(prompt["prompt_token_ids"], rng.randrange(1, 5)) for prompt in prompts]
    options = {"max_num_seqs": 64, "max_model_len": MAX_LEN, "max_num_batched_tokens": MAX_LEN}
    spindle = {"keep_ratio": 0.25, "min_prompt_len": 0}
    with engine(model, spindle, kv_cache_memory_bytes=8 * MIB, **options) as running:
        watch = PlanWatch(running)
        tokens = running.run(asks)
        return {
            **watch.report(),
            "answered": sum(len(t) == a.max_tokens for t, a in zip(tokens, asks, strict=True)),
            "shorter_than_window": sum(length < 32 for length in lengths),
            "blocks_used": sum(-(-length // 32) for length in lengths),
        }


@pytest.fixture(scope="module")
def runs(small_llama: str) -> dict[str, Any]:
    return in_child(held, model=small_llama)


@pytest.mark.parametrize("mode", MODES)
def test_plan_is_held_under_aborts(runs: dict[str, Any], mode: str) -> None:
    """64 requests at once, cut off at any moment: rows as planned, every block given back."""
    run = runs[f"aborts-{mode}"]
    assert run["problems"] == []
    assert run["idle_free"]
    assert run["left_over"] == []
    assert run["reduced_rows"] > 500
    assert min(run["aborted"].get(stage, 0) for stage in STAGES) >= 3
    waits = mode in ("paced", "waits")
    assert (run["aborted"].get("held", 0) >= 3) == waits
    assert (run["aborted"].get("before_reduction", 0) >= 3) == (mode == "waits")
    assert (run["held_steps"] > 30) == waits


@pytest.mark.parametrize("side", ["spindle", "codebooks", "heads", "paced", "waits"])
def test_plan_is_held_under_preemption(runs: dict[str, Any], side: str) -> None:
    """Preempted requests are reduced again, to the same plan, and leak nothing."""
    run = runs["preemption"][f"{side}-2"]
    assert run["preempted"] >= 3
    assert run["watch"]["problems"] == []
    assert run["watch"]["idle_free"]
    assert run["watch"]["left_over"] == []
    assert run["watch"]["resumed_chunks_at_prompt_end"] >= 3


def test_preempted_requests_answer_as_unpreempted(runs: dict[str, Any]) -> None:
    """Preemption changes no token: not in stock vLLM, and not with reduced prompts."""
    run = runs["preemption"]
    for name in ("stock", "spindle", "codebooks", "heads", "paced", "waits"):
        assert run[f"{name}-2"]["preempted"] >= 3
        assert run[f"{name}-64"]["preempted"] == 0
        assert run[f"{name}-2"]["tokens"] == run[f"{name}-64"]["tokens"]
    # The test can tell: reduced prompts are answered differently.
    assert run["spindle-64"]["tokens"] != run["stock-64"]["tokens"]


def test_a_thousand_requests_leak_nothing(runs: dict[str, Any]) -> None:
    """From one token to the model's maximum: all answered, every row as planned, all free."""
    run = runs["thousand"]
    assert run["answered"] == 1000
    assert run["shorter_than_window"] > 100
    assert run["problems"] == []
    assert run["idle_free"]
    assert run["left_over"] == []
    assert run["reduced_rows"] > 500

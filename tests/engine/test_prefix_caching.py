"""Prefix caching stays on: shared prompts are found again, and what is shared is never written."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import tiny
from engine_child import in_child

pytestmark = pytest.mark.engine

NUM_REQUESTS = 200
SPINDLE = {"keep_ratio": 0.25}
# Every kv head in blocks of its own.
HEADS = {**SPINDLE, "head_shares": tiny.head_shares(num_layers=3, num_heads=2)}
NUM_WITH_HEADS = 60
NEEDLE = str(Path(__file__).parents[2] / "models" / "needle")
NUM_QUESTIONS = 16


def on_and_off(model: str) -> dict[str, Any]:
    """The same requests with the cache and without, whole, in chunks, preempted, with codebooks."""
    from engine_probe.engines import engine
    from engine_probe.plan_watch import PlanWatch
    from engine_probe.shared_prompts import Checker, answered, requests

    asks, found = requests(NUM_REQUESTS), {}
    exact = {"dtype": "float32", "max_num_seqs": 16}
    with engine(model, SPINDLE, **exact) as running:
        found["off"], _ = answered(running, asks, aborts=False)
    with engine(model, HEADS, **exact) as running:
        found["heads off"], _ = answered(running, asks[:NUM_WITH_HEADS], aborts=False)
    little = {**exact, "kv_cache_memory_bytes": 2304 << 10, "max_model_len": 1216}
    runs = {
        "whole": (SPINDLE, exact),
        "chunks": (SPINDLE, {**exact, "max_num_batched_tokens": 200}),
        "little memory": (SPINDLE, little),
        "heads": (HEADS, {**little, "max_num_batched_tokens": 200}),
    }
    for name, (spindle, options) in runs.items():
        these = asks[:NUM_WITH_HEADS] if name == "heads" else asks
        with engine(model, spindle, enable_prefix_caching=True, **options) as running:
            checker = Checker(running)
            with PlanWatch(running) as watch:
                tokens, cached = answered(running, these, aborts=name != "whole")
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


def without_the_cap(model: str, cap: str) -> dict[str, int]:
    """What the checker says once blocks are hashed, or hits taken, as in stock vLLM."""
    from engine_probe.engines import engine
    from engine_probe.shared_prompts import Checker, answered, requests
    from vllm_spindle.engine.manager import SpindleManager
    from vllm_spindle.engine.scheduler import SpindleSchedulerMixin

    if cap == "hash":
        del SpindleManager.cache_blocks
    else:
        del SpindleSchedulerMixin._get_local_prefix_cache_hit
    options = {"enable_prefix_caching": True, "dtype": "float32", "max_num_seqs": 16}
    with engine(model, SPINDLE, **options) as running:
        checker = Checker(running)
        # Beyond the cap a hit leaves no queries to score with.
        checker.skip_reductions()
        answered(running, requests(30), aborts=False)
    return {"checked": checker.num_checked, "written_shared": checker.problems}


def needle_answers() -> dict[str, list[Any]]:
    """Questions behind one text, through codebooks, with the cache and without."""
    from tokenizers import Tokenizer

    from engine_probe.engines import Ask, engine
    from engine_probe.shared_prompts import Checker
    from vllm_spindle.evaluation.needle import make_questions

    encode = Tokenizer.from_file(f"{NEEDLE}/tokenizer.json").encode
    text, *prompts = [
        encode(question.prompt).ids for question in make_questions(NUM_QUESTIONS + 1, 512, seed=9)
    ]
    merging = {**SPINDLE, "method": "both", "protected_prefix_tokens": 256}
    found: dict[str, list[Any]] = {}
    for is_on in (False, True):
        with engine(NEEDLE, merging, enable_prefix_caching=is_on) as running:
            checker = Checker(running)
            for index, prompt in enumerate(prompts):
                running.add(f"r{index}", Ask(text[:256] + prompt[1:], 6))
            done = running.drain()
            answers = [list(done[f"r{i}"].outputs[0].token_ids) for i in range(len(prompts))]
            cached = sum(each.num_cached_tokens for each in done.values())
        found["on" if is_on else "off"] = [answers, cached, checker.num_checked, checker.problems]
    return found


@pytest.fixture(scope="module")
def found(thin_llama: str) -> dict[str, Any]:
    """Every run."""
    return in_child(on_and_off, model=thin_llama)


@pytest.mark.parametrize("run", ["whole", "chunks", "little memory", "heads"])
def test_same_tokens_as_without_a_cache(found: dict[str, Any], run: str) -> None:
    """Token for token, for every request that was not aborted."""
    tokens, off = found[run]["tokens"], found["heads off" if run == "heads" else "off"]
    least = {"whole": len(off), "heads": len(off) // 4}.get(run, len(off) // 2)
    assert len(off) >= len(tokens) >= least
    assert {i: off[i] for i in tokens} == tokens
    assert any(found["heads off"][i] != found["off"][i] for i in found["heads off"])


def test_same_answers_through_codebooks() -> None:
    """The needle model's, to questions behind a text that they share."""
    found = in_child(needle_answers)
    (off, *_), (on, cached, checked, problems) = found["off"], found["on"]
    assert on == off
    assert cached >= (NUM_QUESTIONS - 1) * 224
    assert problems == 0 < checked


@pytest.mark.parametrize("run", ["whole", "chunks", "little memory", "heads", "codebooks"])
def test_no_shared_block_is_written(found: dict[str, Any], run: str) -> None:
    """On every reduction: no hash, one owner."""
    assert found[run]["written_shared"] == 0
    assert found[run]["cached"] > 0


@pytest.mark.parametrize("run", ["whole", "chunks", "little memory", "heads"])
def test_plan_is_held_with_shared_blocks(found: dict[str, Any], run: str) -> None:
    """At every step, and nothing is left at the end."""
    assert found[run]["problems"] == []
    assert found[run]["idle_free"]
    assert found[run]["left_over"] == []
    assert found[run]["checked"] > (300 if run == "heads" else 1000)
    assert found["little memory"]["preemptions"] > 0 < found["heads"]["preemptions"]


def test_most_of_stocks_hits_remain(found: dict[str, Any]) -> None:
    """The shallowest band's region bounds a hit; most of a shared prefix lies before it."""
    assert found["whole"]["cached"] > 0.5 * found["stock_cached"] > 0


@pytest.mark.parametrize("cap", ["hash", "hit"])
def test_the_checker_sees_a_missing_cap(thin_llama: str, cap: str) -> None:
    """It would say so, were blocks hashed, or hits taken, as in stock vLLM."""
    said = in_child(without_the_cap, model=thin_llama, cap=cap)
    assert said["checked"] > 0
    assert said["written_shared"] > 0

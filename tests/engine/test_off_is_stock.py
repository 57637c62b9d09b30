"""Off is stock: asked for nothing, spindle leaves vLLM token for token as it is."""

from typing import Any

import pytest

import tiny
from engine_child import in_child

pytestmark = pytest.mark.engine

NUM_PROMPTS = {"tp1": 32, "tp1-float32": 12, "tp2": 12}
LENGTHS = list(range(310, 700, 26))
NUM_TOKENS = 8
OFF = {
    "not-asked": None,
    "keep-ratio-1": {"keep_ratio": 1.0},
    # On, but every request asks for all of its cache.
    "requests-keep-all": {"keep_ratio": 0.25},
    "codebooks-keep-all": {"keep_ratio": 0.25, "method": "both"},
    "heads-keep-all": {
        "keep_ratio": 0.25,
        "head_shares": tiny.head_shares(num_layers=2, num_heads=2),
    },
}
# Two ranks first: a one-rank engine binds its very process to its cores. In bf16 the sum over two
# ranks rounds otherwise than one rank's, in stock vLLM too, so the two are compared in float32.
RANKS: dict[str, dict[str, Any]] = {
    "tp2": {
        "dtype": "float32",
        "tensor_parallel_size": 2,
        "distributed_executor_backend": "mp",
    },
    "tp1-float32": {"dtype": "float32"},
    "tp1": {},
}
TP2_ENVIRONMENT = {"VLLM_CPU_OMP_THREADS_BIND": "0|1"}
# A start on two ranks takes longest, so there is one with the plugin: the one that has it on.
RUNS = [(name, "tp1") for name in ("stock", *OFF)]
RUNS += [(name, "tp2") for name in ("stock", "requests-keep-all")]
RUNS += [(name, "tp1-float32") for name in ("stock", "requests-keep-all")]
CHUNKS = {"whole": 2048, "chunks-of-300": 300}


def stock(model: str) -> dict[str, Any]:
    """Every answer of a vLLM that never heard of spindle."""
    import sys

    found = answers(model, {"stock": None})
    loaded = [name for name in sys.modules if name.startswith(("vllm_spindle", "vllm_spindle_"))]
    return {"loaded": loaded, **found}


def answers(model: str, settings: dict[str, Any]) -> dict[str, Any]:
    """Tokens and log-probabilities by setting, tensor parallel size and chunking."""
    import os

    found: dict[str, Any] = {}
    for ranks, options in RANKS.items():
        if ranks == "tp2":
            os.environ.update(TP2_ENVIRONMENT)
        else:
            for name in TP2_ENVIRONMENT:
                os.environ.pop(name, None)
        for name, spindle in settings.items():
            if (name, ranks) in RUNS:
                found[f"{name}-{ranks}"] = _answer(model, spindle, options, NUM_PROMPTS[ranks])
    return found


def _answer(
    model: str, spindle: dict[str, Any] | None, options: dict[str, Any], num_prompts: int
) -> dict[str, Any]:
    from engine_probe.engines import Ask, engine

    prompts = tiny.prompts(num_prompts, LENGTHS, seed=2)
    is_on = spindle is not None and spindle["keep_ratio"] < 1
    with engine(model, spindle, **options) as running:
        found: dict[str, Any] = {"classes": running.describe()}
        for chunking, num_tokens in CHUNKS.items():
            running.chunk(num_tokens)
            for index, prompt in enumerate(prompts):
                ask = Ask(
                    prompt["prompt_token_ids"],
                    NUM_TOKENS,
                    keep_ratio=1.0 if is_on else None,
                    fields={"logprobs": 3},
                )
                running.add(f"r{index}", ask)
            finished = running.drain()
            outputs = [finished[f"r{index}"].outputs[0] for index in range(num_prompts)]
            found[chunking] = {
                "tokens": [list(output.token_ids) for output in outputs],
                "logprobs": [[_by_token(step) for step in output.logprobs] for output in outputs],
            }
        if is_on:
            from engine_probe.plan_watch import PlanWatch

            with PlanWatch(running) as watch:
                asks = [Ask(prompt["prompt_token_ids"], NUM_TOKENS) for prompt in prompts]
                found["reduced"] = {"tokens": running.run(asks), **watch.report()}
    return found


def _by_token(step: dict[int, Any]) -> list[tuple[int, float]]:
    return sorted((token, each.logprob) for token, each in step.items())


@pytest.fixture(scope="module")
def stock_answers(small_llama: str) -> dict[str, Any]:
    return in_child(stock, env={"VLLM_PLUGINS": ""}, model=small_llama)


@pytest.fixture(scope="module")
def plugin_answers(small_llama: str) -> dict[str, Any]:
    return in_child(answers, model=small_llama, settings=OFF)


def test_stock_is_stock(stock_answers: dict[str, Any]) -> None:
    """The yardstick ran without a line of ours, and its prompts are answered differently."""
    assert stock_answers["loaded"] == []
    tokens = stock_answers["stock-tp1"]["whole"]["tokens"]
    assert len({tuple(each) for each in tokens}) == NUM_PROMPTS["tp1"]


@pytest.mark.parametrize(("setting", "ranks"), [run for run in RUNS if run[0] != "stock"])
@pytest.mark.parametrize("chunking", CHUNKS)
def test_off_answers_as_stock(
    stock_answers: dict, plugin_answers: dict, setting: str, ranks: str, chunking: str
) -> None:
    """Every prompt: the same tokens, the same log-probabilities to the last bit."""
    expected = stock_answers[f"stock-{ranks}"][chunking]
    found = plugin_answers[f"{setting}-{ranks}"][chunking]
    assert found["tokens"] == expected["tokens"]
    assert found["logprobs"] == expected["logprobs"]


@pytest.mark.parametrize(
    ("setting", "ranks"), [run for run in RUNS if run[0] in ("not-asked", "keep-ratio-1")]
)
def test_off_runs_stock_classes(
    stock_answers: dict, plugin_answers: dict, setting: str, ranks: str
) -> None:
    """No extra KV-cache group, and worker, scheduler, spec and manager are vLLM's own."""
    found = plugin_answers[f"{setting}-{ranks}"]["classes"]
    assert found == stock_answers[f"stock-{ranks}"]["classes"]
    assert found["specs"] == ["FullAttentionSpec"]


def test_two_ranks_reduce_as_one(stock_answers: dict, plugin_answers: dict) -> None:
    """At 0.25 two ranks hold the plan, and answer as one rank does; stock's two ranks do too."""
    one, two = (
        plugin_answers[f"requests-keep-all-{ranks}"]["reduced"] for ranks in ("tp1-float32", "tp2")
    )
    for found in (one, two):
        assert found["problems"] == []
        assert found["idle_free"]
        assert found["left_over"] == []
        assert found["reduced_rows"] > NUM_PROMPTS["tp2"]
    whole, whole_by_two = (
        stock_answers[f"stock-{ranks}"]["chunks-of-300"]["tokens"]
        for ranks in ("tp1-float32", "tp2")
    )
    assert whole == whole_by_two
    assert one["tokens"] == two["tokens"] != whole

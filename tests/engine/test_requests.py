"""One request: several samples, streaming, a ratio of its own, a bad one, compiled mode."""

from pathlib import Path
from typing import Any

import pytest

from engine_child import in_child

pytestmark = pytest.mark.engine

NEEDLE = Path(__file__).parents[2] / "models" / "needle"
PROMPT_LEN = 1100
RATIOS = [None, 0.1, 0.25, 0.5, 0.75, 1.0]
KINDS = ["CUMULATIVE", "DELTA", "FINAL_ONLY"]
BAD = {
    "zero": {"spindle_keep_ratio": 0},
    "negative": {"spindle_keep_ratio": -0.5},
    "above-one": {"spindle_keep_ratio": 1.5},
    "not-a-number": {"spindle_keep_ratio": float("nan")},
    "text": {"spindle_keep_ratio": "0.5"},
    "boolean": {"spindle_keep_ratio": True},
    "list": {"spindle_keep_ratio": [0.5]},
    "negative-prefix": {"spindle_protected_prefix_tokens": -1},
    "half-a-token": {"spindle_protected_prefix_tokens": 0.5},
    "endless-prefix": {"spindle_protected_prefix_tokens": float("inf")},
    "no-prefix": {"spindle_protected_prefix_tokens": float("nan")},
    "unknown-key": {"spindle_window": 16},
    "resumable": {},
}


def served(model: str) -> dict[str, Any]:
    """An eager engine through all of it, then a compiled one, then one without spindle."""
    from engine_probe.engines import engine

    found: dict[str, Any] = {}
    with engine(model, {"keep_ratio": 0.25}) as running:
        found |= _samples_and_streams(running) | _ratios(running)
        found["bad"] = {name: _refused(running, name, args) for name, args in BAD.items()}
        found["after_bad"] = running.run([_ask()])
    with engine(model, {"keep_ratio": 0.25}, enforce_eager=False) as running:
        found["compiled"] = _compiled(running)
    with engine(model) as running:
        found["stock_bad"] = _refused(running, "off", {"spindle_keep_ratio": 0.5})
        found["stock_all"] = running.run([_ask(keep_ratio=1.0)])
        found["stock"] = running.run([_ask()])
    return found


def _ask(**options: Any) -> Any:
    import tiny
    from engine_probe.engines import Ask

    (prompt,) = tiny.prompts(1, [PROMPT_LEN], seed=8)
    return Ask(prompt["prompt_token_ids"], 24, **options)


def _samples_and_streams(running: Any) -> dict[str, Any]:
    from vllm.sampling_params import RequestOutputKind

    from engine_probe.plan_watch import PlanWatch

    found: dict[str, Any] = {"one": running.run([_ask()])}
    with PlanWatch(running) as watch:
        running.add("greedy", _ask(fields={"n": 3, "temperature": 1.0, "top_k": 1}))
        found["greedy_samples"] = [
            list(sample.token_ids) for sample in running.drain()["greedy"].outputs
        ]
        running.add("hot", _ask(keep_ratio=0.5, fields={"n": 3, "temperature": 2.0, "seed": 1}))
        found["hot_samples"] = [list(sample.token_ids) for sample in running.drain()["hot"].outputs]
        found["samples_watch"] = watch.report()
    found["streamed"] = {}
    for kind in KINDS:
        running.add(kind, _ask(fields={"output_kind": RequestOutputKind[kind]}))
        parts = []
        while running.engine.has_unfinished_requests():
            parts += [list(out.outputs[0].token_ids) for out in running.step()]
        running.step()
        found["streamed"][kind] = parts
    return found


def _ratios(running: Any) -> dict[str, Any]:
    """Blocks that each of several requests in one batch holds of its prompt, band by band."""
    found: dict[str, Any] = {}
    for index, keep_ratio in enumerate(RATIOS):
        running.add(f"r{index}", _ask(keep_ratio=keep_ratio))
    for _ in range(4):
        running.step()
    found["held"] = {
        request_id.rpartition("-")[0]: [
            sum(not block.is_null for block in manager.req_to_blocks[request_id])
            for manager in running.managers
        ]
        for request_id in running.scheduler.requests
    }
    policy = running.managers[0].kv_cache_spec.policy
    found["planned"] = {
        f"r{index}": [plan.held_blocks for plan in policy.plan(PROMPT_LEN, keep_ratio)]
        for index, keep_ratio in enumerate(RATIOS)
    }
    finished = running.drain()
    found["by_ratio"] = [list(finished[f"r{i}"].outputs[0].token_ids) for i in range(len(RATIOS))]
    return found


def _refused(running: Any, name: str, extra_args: dict[str, Any]) -> dict[str, Any]:
    from vllm import SamplingParams

    processor = running.engine.input_processor
    try:
        processor.process_inputs(
            name,
            {"prompt_token_ids": list(_ask().prompt)},
            SamplingParams(extra_args=extra_args or None),
            supported_tasks=running.engine.get_supported_tasks(),
            resumable=name == "resumable",
        )
    except Exception as error:
        parameter = getattr(error, "parameter", None)
        return {"error": type(error).__name__, "parameter": parameter, "message": str(error)}
    return {}


def beams() -> dict[str, Any]:
    """What a beam search says, with spindle and without."""
    from vllm.exceptions import VLLMValidationError
    from vllm.sampling_params import BeamSearchParams

    from engine_probe.engines import engine

    params = BeamSearchParams(beam_width=2, max_tokens=3, ignore_eos=True)
    found: dict[str, Any] = {}
    for name, spindle in {"on": {"keep_ratio": 0.02}, "off": None}.items():
        with engine(str(NEEDLE), spindle, skip_tokenizer_init=False) as running:
            try:
                (answer,) = running.llm.beam_search([{"prompt": "The quick brown fox"}], params)
                found[name] = len(answer.sequences)
            except VLLMValidationError as error:
                found[name] = [error.parameter, str(error)]
            found[name + "_after"] = [len(tokens) for tokens in running.run([_ask()])]
    return found


def _compiled(running: Any) -> dict[str, Any]:
    from dataclasses import asdict

    from engine_probe.plan_watch import PlanWatch
    from engine_probe.twin import capture, compare

    running.chunk(300)
    with PlanWatch(running) as watch, capture() as seen:
        tokens = running.run([_ask(), _ask(keep_ratio=0.5)])
    lens = {"r0": (PROMPT_LEN, None), "r1": (PROMPT_LEN, 0.5)}
    policy = running.managers[0].kv_cache_spec.policy
    mode = running.engine.vllm_config.compilation_config.mode
    return {
        "mode": int(mode),
        "tokens": tokens,
        "watch": watch.report(),
        **asdict(compare(seen, policy, lens)),
    }


@pytest.fixture(scope="module")
def found(llama: str) -> dict[str, Any]:
    return in_child(served, model=llama)


def test_samples_of_one_prompt_are_reduced_each(found: dict[str, Any]) -> None:
    """n = 3: samples of the top token equal the single answer, hot ones differ, all as planned."""
    assert found["greedy_samples"] == found["one"] * 3
    assert len({tuple(sample) for sample in found["hot_samples"]}) == 3
    assert found["samples_watch"]["problems"] == []
    assert found["samples_watch"]["reduced_rows"] > 300
    assert found["samples_watch"]["idle_free"]


def test_streaming_kinds_agree(found: dict[str, Any]) -> None:
    """Deltas add up to the last cumulative output, and to the only one of FINAL_ONLY."""
    (expected,) = found["one"]
    streamed = found["streamed"]
    assert len(streamed["DELTA"]) == len(streamed["CUMULATIVE"]) == len(expected)
    assert sum(streamed["DELTA"], []) == expected
    assert streamed["CUMULATIVE"][-1] == expected
    assert streamed["FINAL_ONLY"] == [expected]


def test_a_request_holds_what_its_own_ratio_plans(found: dict[str, Any]) -> None:
    """Six ratios in one batch: each request's blocks are its own plan's, the answers too."""
    assert found["held"] == found["planned"]
    totals = [sum(found["held"][f"r{i}"]) for i in range(1, len(RATIOS))]
    assert totals == sorted(totals) and len(set(totals)) == len(totals)
    assert found["by_ratio"][0] == found["by_ratio"][2] == found["one"][0]
    assert found["by_ratio"][-1] == found["stock"][0]
    assert found["by_ratio"][-1] != found["by_ratio"][0]


@pytest.mark.parametrize("case", BAD)
def test_a_bad_request_is_refused_at_admission(found: dict[str, Any], case: str) -> None:
    """VLLMValidationError (HTTP 400) naming the parameter; the engine serves on."""
    refused = found["bad"][case]
    assert refused["error"] == "VLLMValidationError"
    expected = {
        "unknown-key": "spindle_window",
        "resumable": "resumable",
        "negative-prefix": "spindle_protected_prefix_tokens",
        "half-a-token": "spindle_protected_prefix_tokens",
        "endless-prefix": "spindle_protected_prefix_tokens",
        "no-prefix": "spindle_protected_prefix_tokens",
    }
    assert refused["parameter"] == expected.get(case, "spindle_keep_ratio")
    if case not in expected:
        assert "(0, 1]" in refused["message"]
    assert found["after_bad"] == found["one"]


def test_without_spindle_a_request_cannot_ask_for_it(found: dict[str, Any]) -> None:
    """On a stock engine a ratio below one is refused and says what to start; 1.0 is served."""
    assert found["stock_bad"]["error"] == "VLLMValidationError"
    assert "--additional-config" in found["stock_bad"]["message"]
    assert found["stock_all"] == found["stock"]


def test_compiled_mode_holds_plan_and_twin(found: dict[str, Any]) -> None:
    """torch.compile instead of eager: the same plan, the same twin.

    Not the same tokens: its fused kernels round otherwise, in stock vLLM too.
    """
    compiled = found["compiled"]
    assert compiled["mode"] > 0
    assert compiled["watch"]["problems"] == []
    assert compiled["watch"]["idle_free"]
    assert compiled["rows"] > 200
    assert compiled["error"] < 5e-3
    assert compiled["kept_differ"] == 0 < compiled["kept_layers"]
    assert [len(tokens) for tokens in compiled["tokens"]] == [24, 24]


def test_a_beam_search_is_refused() -> None:
    """Each of its tokens is a new prompt's first: with spindle it would be full KV, unsaid."""
    found = in_child(beams)
    parameter, message = found["on"]
    assert parameter == "use_beam_search"
    assert "beam search is not supported with spindle" in message
    assert found["off"] == 2
    assert found["on_after"] == found["off_after"] == [24]

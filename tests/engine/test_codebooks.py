"""Bands with codebooks: the compiled kernel over paged regions against the float32 oracle."""

from typing import Any

import pytest

from engine_child import in_child

pytestmark = pytest.mark.engine

# Entries are bf16 and norms fp16 in the region; the oracle reads neither.
MAX_ERROR = 1.5e-2
MODES = {
    "both": {"method": "both"},
    "merge": {"method": "merge", "budget": "uniform"},
    "prefix": {"method": "both", "protected_prefix_tokens": 200},
    "mixed": {"band_methods": ["merge", "both", "evict"], "theta_key": 0.9, "key_share": 0.25},
}
PROMPT_LENS = [1500, 1024, 801, 300, 95]
LONGEST = PROMPT_LENS[0]
CHUNKS = {"whole": 2048, "64": 64, "300": 300, "window-cut": LONGEST - 16}


def codebooks(model: str, modes: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Per mode: agreement of a mixed batch in chunks of 300, blocks when idle, counts."""
    from dataclasses import asdict

    import tiny
    from engine_probe.engines import Ask, engine
    from engine_probe.twin import capture, compare

    prompts = [each["prompt_token_ids"] for each in tiny.prompts(5, PROMPT_LENS, seed=1)]
    own = [None, None, 0.75, None, None]
    asks = [
        Ask(prompt, max_tokens=6 + 3 * i, keep_ratio=own[i]) for i, prompt in enumerate(prompts)
    ]
    lens = {f"r{i}": (len(ask.prompt), ask.keep_ratio) for i, ask in enumerate(asks)}
    answers: dict[str, Any] = {}
    for mode_name, mode in modes.items():
        with engine(model, {"keep_ratio": 0.5, **mode}) as running:
            policy = running.managers[0].kv_cache_spec.policy
            running.chunk(300)
            with capture() as seen:
                running.run(asks)
            answers[mode_name] = {
                **asdict(compare(seen, policy, lens)),
                "mixed_steps": seen.mixed_steps,
                "idle_free": running.is_idle_and_free,
                "bands": running.scheduler._stats["bands"],
            }
            if mode_name == "both":
                answers["chunks"] = {
                    name: _alone(running, prompts[0], chunk) for name, chunk in CHUNKS.items()
                }
            if mode_name == "mixed":
                answers["hundred"] = _hundred(running, policy)
    return answers


def _alone(running: Any, prompt: list[int], chunk: int) -> dict[str, Any]:
    """What one prompt's codebooks hold and what it answers."""
    from engine_probe.engines import Ask
    from engine_probe.twin import capture, entered_last_layer

    running.chunk(chunk)
    with capture() as seen:
        tokens = running.run([Ask(prompt, max_tokens=30)])
    held = {}
    for (_, layer), each in seen.codebooks.items():
        *books, positions = each[-1]
        held[layer] = {
            "positions": [of_head.tolist() for of_head in positions],
            "codes": [[book.codes.tolist() for book in side] for side in books],
        }
    return {"tokens": tokens, "held": held, "entered": entered_last_layer(seen, LONGEST)}


def _hundred(running: Any, policy: Any) -> dict[str, Any]:
    """100 shorter prompts at once, a few tokens each."""
    from dataclasses import asdict

    import tiny
    from engine_probe.engines import Ask
    from engine_probe.twin import capture, compare

    prompts = [each["prompt_token_ids"] for each in tiny.prompts(100, list(range(160, 460, 3)))]
    running.chunk(2048)
    with capture() as seen:
        running.run([Ask(prompt, max_tokens=4) for prompt in prompts])
    lens = {f"r{i}": (len(prompt), None) for i, prompt in enumerate(prompts)}
    return {**asdict(compare(seen, policy, lens)), "requests": len({r for r, _ in seen.rows})}


@pytest.fixture(scope="module")
def answers(llama: str) -> dict[str, Any]:
    return in_child(codebooks, model=llama, modes=MODES)


@pytest.mark.parametrize("mode", MODES)
def test_attention_over_codebooks_equals_the_oracle(answers: dict[str, Any], mode: str) -> None:
    """Every decode output of a layer with codebooks is the oracle's, in mixed batches too."""
    found = answers[mode]
    assert found["mixed_steps"] > 0
    assert found["merged_rows"] > 100
    assert found["merged_error"] < MAX_ERROR


def test_a_hundred_prompts_equal_the_oracle(answers: dict[str, Any]) -> None:
    """The worst of 100 prompts is within bf16 rounding."""
    found = answers["hundred"]
    assert found["requests"] == 100
    assert found["merged_rows"] > 1100  # 3 tokens, 4 layers; the smallest regions hold none
    assert found["merged_error"] < MAX_ERROR
    assert found["kept_differ"] == 0
    # Blocks that held a region hold prompts next, and vLLM's kernel reads beyond a prompt's end.
    assert found["prompt_error"] < 5e-3


def test_a_band_that_evicts_beside_them_keeps_what_the_core_chooses(
    answers: dict[str, Any],
) -> None:
    """Methods go by band: the evicting band is unchanged."""
    found = answers["mixed"]
    assert found["kept_layers"] > 0
    assert found["kept_differ"] == 0
    assert found["error"] < 5e-3


@pytest.mark.parametrize("chunk", [name for name in CHUNKS if name != "whole"])
def test_chunked_equals_whole(answers: dict[str, Any], chunk: str) -> None:
    """However the prompt is cut: the same tokens behind the same codes, the same answer.

    Where stock vLLM rounds by chunk itself (``tests/engine/test_twin.py``): nearly the same tokens.
    """
    whole, cut = (answers["chunks"][name] for name in ("whole", chunk))
    assert len(whole["held"]) >= 4
    if cut["entered"] == whole["entered"]:
        assert cut == whole
        return
    same, held = 0, 0
    for layer, of_layer in whole["held"].items():
        pairs = zip(of_layer["positions"], cut["held"][layer]["positions"], strict=True)
        for ours, theirs in pairs:
            same, held = same + len({*ours} & {*theirs}), held + len(ours)
    assert same >= 0.9 * held > 0


@pytest.mark.parametrize("mode", MODES)
def test_no_block_is_left(answers: dict[str, Any], mode: str) -> None:
    """When idle, every block is free again."""
    assert answers[mode]["idle_free"]


@pytest.mark.parametrize("mode", MODES)
def test_the_counts_add_up(answers: dict[str, Any], mode: str) -> None:
    """Entries stay within capacity; every merged token has two codes per head and layer."""
    bands = answers[mode]["bands"]
    for band, vectors in enumerate(bands["codebook_vectors"]):
        # 2 layers a band, 2 kv heads, a key and a value.
        assert vectors == pytest.approx(bands["tokens_merged"][band] * 2 * 2 * 2)
        assert bands["codebook_entries"][band] <= bands["codebook_capacity"][band]
        assert bands["codebook_overflow"][band] % 2 == 0
        assert bands["codebook_similarity_sum"][band] <= vectors * (1 + 1e-5)
    merging = [m != "evict" for m in MODES[mode].get("band_methods", ["both"] * 3)]
    assert [count > 0 for count in bands["tokens_merged"]] == merging


def loaded(model: str) -> list[str]:
    """Modules loaded once vLLM has found the classes it is told to start."""
    import sys

    import vllm_spindle.processes.scheduler
    import vllm_spindle.processes.worker_cpu  # noqa: F401

    return [name for name in ("numba", "llvmlite", "triton.language.core") if name in sys.modules]


def test_no_compiler_is_loaded_before_vllm_starts(llama: str) -> None:
    """vLLM's kernel registration scans every loaded module and trips over llvmlite's."""
    assert "llvmlite" not in in_child(loaded, model=llama)
    assert "numba" not in in_child(loaded, model=llama)

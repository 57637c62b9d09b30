"""Fast equals slow: the engine's reduced attention against the pure-torch twin."""

from typing import Any

import pytest

import tiny
from engine_child import in_child

pytestmark = pytest.mark.engine

MAX_ERROR = 5e-3
MODES = {
    f"{gqa}-{score}": {"gqa": gqa, "score": score}
    for gqa in ("union", "mean", "unfold")
    for score in ("received", "pooled", "paper")
}
# A band for every layer, and a window that is no whole block.
MODES["layer-bands"] = {"num_bands": 6, "budget": "pyramid", "window": 48, "recent": 20}
# A prefix that every band keeps, off the block grid; with a copy for each query head, too.
MODES["prefix"] = {"protected_prefix_tokens": 200}
MODES["prefix-unfold"] = {"protected_prefix_tokens": 96, "gqa": "unfold"}
# Every kv head in blocks of its own, by layers and in longer bands; a prefix before them.
HEAD_SHARES = tiny.head_shares(num_layers=6, num_heads=2)
MODES["heads"] = {"head_shares": HEAD_SHARES}
MODES["heads-layer-bands"] = {"head_shares": HEAD_SHARES, "num_bands": 6, "gqa": "mean"}
MODES["heads-prefix"] = {"head_shares": HEAD_SHARES, "protected_prefix_tokens": 200}
# Reduced once some of the answer is there, which then chooses too.
MODES["waits"] = {"reduce_after": 4}
MODES["waits-heads"] = {"head_shares": HEAD_SHARES, "reduce_after": 4}
# Off the block grid, on it, one over; and one too short to be reduced.
PROMPT_LENS = [900, 512, 385, 300, 95]
LONGEST = PROMPT_LENS[0]
# Tokens a step for the longest prompt alone: many chunks, few, one; two that cut its window of
# 32 tokens, once in the middle and once before the very last token.
CHUNKS = {"64": 64, "300": 300, "2048": 2048, "window-cut": LONGEST - 16, "last-token": LONGEST - 1}


def twin(model: str, modes: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Per mode: agreement of a mixed batch in whole prompts, and in chunks of 300; and what the
    longest prompt keeps and answers by chunk size."""
    from dataclasses import asdict

    from engine_probe.engines import Ask, engine
    from engine_probe.twin import capture, compare, entered_last_layer

    prompts = [each["prompt_token_ids"] for each in tiny.prompts(5, PROMPT_LENS, seed=1)]
    own = [None, None, 0.5, None, None]
    asks = [
        Ask(prompt, max_tokens=6 + 3 * i, keep_ratio=own[i]) for i, prompt in enumerate(prompts)
    ]
    lens = {f"r{i}": (len(ask.prompt), ask.keep_ratio) for i, ask in enumerate(asks)}
    answers: dict[str, Any] = {}
    for mode_name, mode in modes.items():
        with engine(model, {"keep_ratio": 0.25, **mode}) as running:
            policy = running.managers[0].kv_cache_spec.policy
            answer: dict[str, Any] = {"chunks": {}}
            for name, chunk in (("whole", 8192), ("chunked", 300)):
                running.chunk(chunk)
                with capture() as seen:
                    running.run(asks)
                answer[name] = {
                    **asdict(compare(seen, policy, lens)),
                    "mixed_steps": seen.mixed_steps,
                }
            for name, chunk in CHUNKS.items():
                running.chunk(chunk)
                with capture() as seen:
                    tokens = running.run([Ask(prompts[0], max_tokens=40)])
                kept = {layer: each[-1].tolist() for (_, layer), each in seen.kept.items()}
                answer["chunks"][name] = {
                    "tokens": tokens,
                    "kept": kept,
                    "entered": entered_last_layer(seen, LONGEST),
                }
            answer["idle_free"] = running.is_idle_and_free
            answers[mode_name] = answer
    return answers


@pytest.fixture(scope="module")
def answers(llama: str) -> dict[str, Any]:
    return in_child(twin, model=llama, modes=MODES)


@pytest.mark.parametrize("chunking", ["whole", "chunked"])
@pytest.mark.parametrize("mode", MODES)
def test_evicted_attention_equals_the_twin(
    answers: dict[str, Any], mode: str, chunking: str
) -> None:
    """Every decode output is the twin's over the same kept tokens, within bf16 rounding."""
    found = answers[mode][chunking]
    assert found["rows"] > 200
    assert found["error"] < MAX_ERROR
    # Until its end a prompt is computed over all of itself.
    assert found["prompt_error"] < MAX_ERROR
    # The test can tell: against full attention the same outputs are far off.
    assert found["error_to_full"] > 20 * MAX_ERROR


@pytest.mark.parametrize("chunking", ["whole", "chunked"])
@pytest.mark.parametrize("mode", MODES)
def test_engine_keeps_what_the_core_chooses(
    answers: dict[str, Any], mode: str, chunking: str
) -> None:
    """In each layer of each reduced prompt the very positions that core/choice.py names."""
    found = answers[mode][chunking]
    assert found["kept_layers"] >= 18
    assert found["kept_differ"] == 0


@pytest.mark.parametrize("mode", MODES)
def test_steps_mix_prefill_and_decode(answers: dict[str, Any], mode: str) -> None:
    """The comparison covered batches that hold reduced rows beside prompts under way."""
    assert answers[mode]["chunked"]["mixed_steps"] >= 3
    assert answers[mode]["idle_free"]


@pytest.mark.parametrize("chunk", [name for name in CHUNKS if name != "2048"])
@pytest.mark.parametrize("mode", MODES)
def test_chunked_equals_whole(answers: dict[str, Any], mode: str, chunk: str) -> None:
    """However the prompt is cut: the same positions kept, the same tokens generated.

    Where stock vLLM rounds by chunk itself, as on CPUs without AVX-512, other queries and keys
    enter the last layer: then nearly the same positions.
    """
    whole, cut = (answers[mode]["chunks"][name] for name in ("2048", chunk))
    assert len(whole["kept"]) >= 4
    if cut["entered"] == whole["entered"]:
        assert cut == whole
        return
    same, kept = 0, 0
    for layer, heads in whole["kept"].items():
        for ours, theirs in zip(_rows(heads), _rows(cut["kept"][layer]), strict=True):
            same, kept = same + len({*ours} & {*theirs}), kept + len(ours)
    assert same >= 0.95 * kept


def _rows(kept: list[Any]) -> list[list[int]]:
    """Positions head by head, of copies too; heads that keep fewer are filled up with -1."""
    if isinstance(kept[0], list):
        return [row for each in kept for row in _rows(each)]
    return [[position for position in kept if position >= 0]]

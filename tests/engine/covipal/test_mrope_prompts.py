"""Prompts whose kept tokens cannot be placed under M-RoPE: 400; unpruned they are served."""

from collections.abc import Callable

import pytest

from engine_child import in_child

pytestmark = pytest.mark.engine

PICTURE = "<|vision_start|><|image_pad|><|vision_end|>"
# name: (prompt, pictures, what it is told when it is pruned; empty: it is served)
PROMPTS = {
    "as the template has it": (f"left {PICTURE} right {PICTURE} what ?", 2, ""),
    "side by side": ("left <|image_pad|><|image_pad|> what ?", 2, "stand side by side"),
    "at the end": ("what ? <|vision_start|><|image_pad|>", 1, "ends with an image or a video"),
    "a video's pad in the text": (f"is <|video_pad|> a pad ? {PICTURE} what ?", 1, "1 more"),
    "a picture's pad in the text": (f"{PICTURE} is <|image_pad|> a pad ?", 1, "1 more"),
}


def told(model: str, family: str) -> dict[str, list[str]]:
    """What each prompt is told, pruned and unpruned."""
    from vllm import SamplingParams
    from vllm.exceptions import VLLMValidationError

    import tiny_lvlm
    from engine_probe.lvlm import lvlm_engine

    found: dict[str, list[str]] = {}
    params = SamplingParams(temperature=0, max_tokens=2)
    with lvlm_engine(model, family, {"selector": "grid", "keep_ratio": 0.25}) as llm:
        for name, (prompt, count, _) in PROMPTS.items():
            pictures = [tiny_lvlm.picture(96, 64, seed) for seed in range(count)]
            for ratio in (0.25, 1.0):
                request = {"prompt": prompt, "multi_modal_data": {"image": pictures}}
                request["mm_processor_kwargs"] = {"covipal_keep_ratio": ratio}
                try:
                    llm.generate([request], params, use_tqdm=False)
                    said = ""
                except VLLMValidationError as error:
                    said = str(error)
                found.setdefault(name, []).append(said)
    return found


@pytest.fixture(scope="module")
def found(lvlm: Callable[[str], str]) -> dict[str, list[str]]:
    """What every prompt is told, from one process."""
    return in_child(told, model=lvlm("qwen2_5_vl"), family="qwen2_5_vl")


@pytest.mark.parametrize("name", PROMPTS)
def test_refused_where_places_are_not_known(found: dict[str, list[str]], name: str) -> None:
    """Positions count from the text before a picture, the answer's from the text behind it."""
    pruned, unpruned = found[name]
    expected = PROMPTS[name][2]
    assert expected in pruned if expected else not pruned
    assert unpruned == ""

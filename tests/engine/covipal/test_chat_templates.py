"""Where a question ends is read off the template that its prompt was rendered with."""

from collections.abc import Callable
from typing import Any

import pytest

from engine_child import in_child

pytestmark = pytest.mark.engine

COVIPAL = {"selector": "cdpruner", "keep_ratio": 0.5}


def chosen(model: str) -> dict[str, int]:
    """Choices that a chat of two turns takes, by where its template comes from."""
    from vllm import SamplingParams

    import tiny_lvlm
    from engine_probe.lvlm import Watch, lvlm_engine, model_of

    def turns(seed: int) -> list[dict[str, Any]]:
        picture = {"type": "image_pil", "image_pil": tiny_lvlm.picture(64, 64, seed)}
        question = {"type": "text", "text": "what is the color of the red circle ?"}
        return [
            {"role": "user", "content": [picture, question]},
            {"role": "assistant", "content": "blue"},
            {"role": "user", "content": "left or right ?"},
        ]

    found = {}
    params = SamplingParams(max_tokens=1, temperature=0)
    other = tiny_lvlm.other_template("llava")
    given = {"own": (COVIPAL, None), "given": (COVIPAL, other)}
    given["named ends"] = (COVIPAL | {"turn_end": ["You are"]}, other)
    for name, (covipal, template) in given.items():
        with lvlm_engine(model, "llava", covipal) as llm:
            watch = Watch(model_of(llm))
            for num_turns in (1, 3):
                llm.chat(turns(7)[:num_turns], params, chat_template=template, use_tqdm=False)
            found[name] = len(watch.indices)
    return found


def test_a_growing_chat_keeps_its_choice(lvlm: Callable[[str], str]) -> None:
    """Whatever template it has: one choice for both turns."""
    assert in_child(chosen, model=lvlm("llava")) == {"own": 1, "given": 1, "named ends": 1}

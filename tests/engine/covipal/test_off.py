"""A server without covipal: who asks it to prune is told so, wherever the option stands."""

from collections.abc import Callable
from typing import Any

import pytest

from engine_child import in_child

pytestmark = pytest.mark.engine

KEY = "covipal_keep_ratio"
# name: (processor arguments, sampling parameters' extra arguments, what it is told)
ASKED: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "nothing": ({}, {}, ""),
    "all tokens": ({KEY: 1.0}, {KEY: 1.0}, ""),
    "with the prompt": ({KEY: 0.5}, {}, "runs without covipal"),
    "with the parameters": ({}, {KEY: 0.5}, "runs without covipal"),
    "no ratio": ({KEY: "half"}, {}, "must be a number"),
    "misspelt": ({"covipal_ratio": 0.5}, {}, "did you mean"),
    "another argument": ({"do_rescale": True}, {}, ""),
}


def told(model: str) -> dict[str, list[Any]]:
    """What each is told, and the length of its prompt where it is served."""
    from vllm import SamplingParams
    from vllm.exceptions import VLLMValidationError

    from engine_probe.lvlm import LvlmAsk, lvlm_engine

    found: dict[str, list[Any]] = {}
    with lvlm_engine(model, "llava", None) as llm:
        for name, (arguments, extra, _) in ASKED.items():
            prompt = LvlmAsk("@ what is red ?", [(64, 64, 1)]).prompt("llava")
            params = SamplingParams(max_tokens=1, extra_args=extra)
            request = prompt | {"mm_processor_kwargs": arguments}
            try:
                answer = llm.generate([request], params, use_tqdm=False)[0]
                found[name] = ["", len(answer.prompt_token_ids)]
            except VLLMValidationError as error:
                found[name] = [str(error), 0]
    return found


def test_no_silent_fallback_to_unpruned(lvlm: Callable[[str], str]) -> None:
    """The option would be ignored: 400. All tokens are what it gives."""
    found = in_child(told, model=lvlm("llava"))
    for name, (_, _, expected) in ASKED.items():
        said, _ = found[name]
        assert expected in said if expected else not said, name
    assert found["all tokens"] == found["nothing"] == found["another argument"]

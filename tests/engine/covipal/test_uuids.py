"""Pictures named by the user: sent once, then by name alone, as far as the choice is the same."""

from collections.abc import Callable
from typing import Any

import pytest

from engine_child import in_child

pytestmark = pytest.mark.engine


def told(model: str, selector: str) -> dict[str, Any]:
    """Tokens of each request, or what it is told."""
    from vllm import SamplingParams
    from vllm.exceptions import VLLMValidationError

    import tiny_lvlm
    from engine_probe.lvlm import lvlm_engine

    found: dict[str, Any] = {}
    params = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
    with lvlm_engine(model, "llava", {"selector": selector, "keep_ratio": 0.5}) as llm:

        def ask(name: str, words: str, picture: Any, ratio: float | None = None) -> None:
            request: dict[str, Any] = {"prompt": f"USER : <image> {words} ASSISTANT :"}
            request |= {"multi_modal_data": {"image": [picture]}}
            request["multi_modal_uuids"] = {"image": ["mine"]}
            if ratio:
                request["mm_processor_kwargs"] = {"covipal_keep_ratio": ratio}
            try:
                answer = llm.generate([request], params, use_tqdm=False)[0]
                found[name] = list(answer.outputs[0].token_ids)
            except (ValueError, VLLMValidationError) as error:
                found[name] = str(error)

        ask("sent", "what ?", tiny_lvlm.picture(64, 64, 1))
        ask("named", "what ?", None)
        ask("another question", "left or right ?", None)
        ask("another ratio", "what ?", None, 0.25)
        ask("sent again", "left or right ?", tiny_lvlm.picture(64, 64, 1))
        ask("named again", "left or right ?", None)
    return found


@pytest.mark.parametrize("selector", ["cdpruner", "grid"])
def test_a_name_alone(lvlm: Callable[[str], str], selector: str) -> None:
    """400 says why the name is not enough: the rows that are known were chosen for other words."""
    found = in_child(told, model=lvlm("llava"), selector=selector)
    assert found["named"] == found["sent"]
    assert found["named again"] == found["sent again"]
    missing = ["another ratio"] + (["another question"] if selector == "cdpruner" else [])
    for name in missing:
        assert "question and covipal_keep_ratio" in found[name]
        assert "send it again" in found[name]
    if selector == "grid":
        assert found["another question"] == found["sent again"]

"""Model runner V2, its kernels interpreted on the CPU: pruned as V1 prunes, token for token."""

from collections.abc import Callable
from typing import Any

import pytest

from engine_child import in_child
from engine_probe.interpreted import ENVIRONMENT

pytestmark = pytest.mark.engine

ON = {"selector": "divprune", "keep_ratio": 0.5}
# One position per token, and three.
FAMILIES = ("llava_next", "qwen2_5_vl")


def served(model: str, family: str, version: int) -> dict[str, Any]:
    """Pruned, unpruned by request and stock: tokens, positions that reach the model, counts."""
    if version == 2:
        from engine_probe.interpreted import enable

        enable()
    from engine_probe.lvlm import LvlmAsk, Watch, answer, lvlm_engine, model_of

    asks = [
        LvlmAsk("@ what is red ?", [(96, 48, 1)]),
        LvlmAsk("left @ or right @ ?", [(48, 96, 2), (64, 64, 3)], keep_ratio=0.25),
        LvlmAsk("You are @ blue circle", [(64, 48, 4)], keep_ratio=1.0),
        LvlmAsk("what is the color of red circle ?"),
    ]
    found: dict[str, Any] = {}
    # Chunks of 64 cut pictures.
    options = {"dtype": "float32", "max_num_batched_tokens": 64, "enable_prefix_caching": False}
    for name, covipal in (("pruned", ON), ("stock", None)):
        with lvlm_engine(model, family, covipal, **options) as llm:
            runner = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker
            found["is_v2"] = hasattr(runner.worker.model_runner, "req_states")
            watch = Watch(model_of(llm))
            plain = [ask if covipal else LvlmAsk(ask.words, ask.pictures) for ask in asks]
            answers = answer(llm, family, plain, max_tokens=6, one_by_one=True)
            found[name] = {
                "tokens": [a["tokens"] for a in answers],
                "lengths": [a["prompt_len"] for a in answers],
                "positions": [each.tolist() for each in watch.positions],
                "chosen": [index.tolist() for index in watch.indices],
            }
    return found


@pytest.fixture(scope="module", params=FAMILIES)
def versions(request: pytest.FixtureRequest, lvlm: Callable[[str], str]) -> dict[str, Any]:
    """One family on both runners, each in a process of its own."""
    model, family = lvlm(request.param), request.param
    return {
        "v1": in_child(served, model=model, family=family, version=1),
        "v2": in_child(served, env=ENVIRONMENT, model=model, family=family, version=2),
    }


@pytest.mark.parametrize("what", ["tokens", "lengths", "positions", "chosen"])
@pytest.mark.parametrize("side", ["pruned", "stock"])
def test_as_on_v1(versions: dict[str, Any], side: str, what: str) -> None:
    """The same rows chosen, at the same positions, the same answers."""
    assert versions["v2"]["is_v2"] and not versions["v1"]["is_v2"]
    assert versions["v2"][side][what] == versions["v1"][side][what]


def test_it_pruned(versions: dict[str, Any]) -> None:
    """Prompts are shorter where asked, and only there."""
    pruned, stock = (versions["v2"][side]["lengths"] for side in ("pruned", "stock"))
    assert [a < b for a, b in zip(pruned, stock, strict=True)] == [True, True, False, False]
    assert len(versions["v2"]["pruned"]["chosen"]) == 3

"""Weights that change under a running engine: no embedding of the old ones is used again."""

from collections.abc import Callable

import pytest

from engine_child import in_child
from engine_probe.interpreted import ENVIRONMENT

pytestmark = pytest.mark.engine


def moved(model: str, family: str, runner: int) -> list[float]:
    """How far embeddings move as the projector's bias moves by one: with a reset, without."""
    if runner == 2:
        from engine_probe.interpreted import enable

        enable()
    from engine_probe.lvlm import LvlmAsk, Watch, answer, lvlm_engine, model_of

    asked = LvlmAsk("@ what is the color ?", [(64, 64, 1)])
    other = LvlmAsk("@ left or right ?", [(64, 64, 1)])
    with lvlm_engine(model, family, {"selector": "cdpruner", "keep_ratio": 0.25}) as llm:
        watch = Watch(model_of(llm))
        answer(llm, family, [asked])
        before = watch.encoded[-1]
        model_of(llm).multi_modal_projector.linear_2.bias.data.add_(1)
        answer(llm, family, [other])
        kept = watch.encoded[-1]
        llm.llm_engine.reset_encoder_cache()
        llm.reset_prefix_cache()
        answer(llm, family, [asked])
        return [float((rows - before).abs().mean()) for rows in (watch.encoded[-1], kept)]


@pytest.mark.parametrize("runner", [1, 2])
def test_a_reset_forgets_kept_embeddings(lvlm: Callable[[str], str], runner: int) -> None:
    """As vLLM's own cache, at vLLM's own call."""
    started = {"env": ENVIRONMENT, "imports_vllm_itself": True} if runner == 2 else {}
    after, without = in_child(moved, model=lvlm("llava"), family="llava", runner=runner, **started)
    assert after == pytest.approx(1, abs=1e-3)
    assert without == 0  # they are kept, and so must be forgotten

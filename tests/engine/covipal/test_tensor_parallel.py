"""Two ranks choose the same rows, and answer as one rank does."""

from collections.abc import Callable
from typing import Any

import pytest

from engine_child import in_child

pytestmark = pytest.mark.engine

OPTIONS = {"selector": "cdpruner", "keep_ratio": 0.5}
TP2 = {"tensor_parallel_size": 2, "distributed_executor_backend": "mp"}


def answers(model: str, family: str) -> list[Any]:
    """Two ranks, then one."""
    import os

    from engine_probe.lvlm import LvlmAsk, answer, lvlm_engine

    asks = [
        LvlmAsk("@ what is red ?", [(64, 48, i)], keep_ratio=(None, 1.0, 0.25)[i % 3])
        for i in range(9)
    ]
    asks.append(LvlmAsk("what is red ?"))
    found = []
    for options, bind in ((TP2, "0|1"), ({}, None)):
        if bind:
            os.environ["VLLM_CPU_OMP_THREADS_BIND"] = bind
        else:
            os.environ.pop("VLLM_CPU_OMP_THREADS_BIND")
        with lvlm_engine(model, family, OPTIONS, **options) as llm:
            found.append([[a["prompt_len"], a["tokens"]] for a in answer(llm, family, asks)])
    return found


@pytest.mark.parametrize("family", ["qwen2_5_vl"])
def test_two_ranks_answer_as_one(lvlm: Callable[[str], str], family: str) -> None:
    """In float32, where the sum over two ranks rounds least."""
    two, one = in_child(answers, model=lvlm(family), family=family)
    assert two == one
    assert len({length for length, _ in one}) > 2

"""Two ranks keep the rows that the first chose, and answer as one rank does."""

from collections.abc import Callable
from typing import Any

import pytest

from engine_child import in_child

pytestmark = pytest.mark.engine

OPTIONS = {"selector": "cdpruner", "keep_ratio": 0.5}
TP2 = {"tensor_parallel_size": 2, "distributed_executor_backend": "mp"}


def answers(model: str, family: str) -> dict[str, Any]:
    """Two ranks, of which the second would choose otherwise, then one."""
    import os

    from engine_probe.lvlm import LvlmAsk, answer, lvlm_engine

    asks = [
        LvlmAsk("@ what is red ?", [(64, 48, i)], keep_ratio=(None, 1.0, 0.25)[i % 3])
        for i in range(9)
    ]
    asks.append(LvlmAsk("what is red ?"))
    found: dict[str, Any] = {}
    for options, bind in ((TP2, "0|1"), ({}, None)):
        if bind:
            os.environ["VLLM_CPU_OMP_THREADS_BIND"] = bind
        else:
            os.environ.pop("VLLM_CPU_OMP_THREADS_BIND")
        with lvlm_engine(model, family, OPTIONS, **options) as llm:
            if bind:
                llm.collective_rpc(_choose_otherwise)
            name = "two" if bind else "one"
            found[name] = [[a["prompt_len"], a["tokens"]] for a in answer(llm, family, asks)]
            if bind:
                found["otherwise"] = llm.collective_rpc(_num_otherwise)
    return found


def _choose_otherwise(worker: Any) -> None:
    """On the second rank: the rows from the other end of the picture."""
    selector = worker.model_runner.get_model().visual_pruner._selector
    stock, worker.num_otherwise = selector.select, 0

    def select(items: Any) -> Any:
        indices = stock(items)
        if worker.rank == 0:
            return indices
        mirrored = [
            item.visual.shape[0] - 1 - index.flip(0)
            for item, index in zip(items, indices, strict=True)
        ]
        worker.num_otherwise += sum(
            bool((a != b).any()) for a, b in zip(indices, mirrored, strict=True)
        )
        return mirrored

    selector.select = select


def _num_otherwise(worker: Any) -> int:
    return worker.num_otherwise


@pytest.mark.parametrize("family", ["qwen2_5_vl"])
def test_two_ranks_answer_as_one(lvlm: Callable[[str], str], family: str) -> None:
    """In float32, where the sum over two ranks rounds least; the choice is the first rank's."""
    found = in_child(answers, model=lvlm(family), family=family)
    assert found["otherwise"] == [0, 6]  # the pictures that are pruned
    assert found["two"] == found["one"]
    assert len({length for length, _ in found["one"]}) > 2

"""No step reduces more than its share, whoever ends in it."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from engine_child import in_child

pytestmark = pytest.mark.engine

NUM_LAYERS = 6
MAX_BATCHED = 4096
PROMPT_LENS = [300, 900, 301, 600, 150, 1500]
SHARES = {"a step": 1.0, "a quarter": 0.25, "a sixteenth": 1 / 16, "a layer": 0.0001}


def paced(model: str, shares: dict[str, float]) -> dict[str, Any]:
    """Prompts that all end in one step, under each share: layers reduced per step, and answers."""
    import tiny
    from engine_probe.engines import Ask, engine
    from engine_probe.plan_watch import PlanWatch

    prompts = [p["prompt_token_ids"] for p in tiny.prompts(6, PROMPT_LENS, seed=8)]
    asks = [Ask(prompt, max_tokens=12) for prompt in prompts]
    answers: dict[str, Any] = {}
    for name, share in shares.items():
        spindle = {"keep_ratio": 0.25, "method": "both", "reduce_share": share}
        with engine(model, spindle, max_num_batched_tokens=MAX_BATCHED) as running:
            watch = PlanWatch(running)
            running.chunk(8192)
            with reductions() as steps:
                for index, ask in enumerate(asks):
                    running.add(f"r{index}", ask)
                finished = {}
                while running.engine.has_unfinished_requests():
                    steps.append([])
                    finished |= {out.request_id: out for out in running.step() if out.finished}
                running.step()
            answers[name] = {
                "steps": [step for step in steps if step],
                "tokens": [list(finished[f"r{i}"].outputs[0].token_ids) for i in range(len(asks))],
                "watch": watch.report(),
            }
    return answers


@contextmanager
def reductions() -> Iterator[list[list[tuple[int, int]]]]:
    """Prompt tokens and layers of every reduction, under the last step of a growing list."""
    from vllm_spindle.engine.reduction import Reducer

    steps: list[list[tuple[int, int]]] = []
    stock = Reducer.reduce

    def reduce(self: Any, end: Any, first_layer: int, stop_layer: int, block_ids: Any) -> None:
        steps[-1].append((end.prompt_len, stop_layer - first_layer))
        stock(self, end, first_layer, stop_layer, block_ids)

    Reducer.reduce = reduce
    try:
        yield steps
    finally:
        Reducer.reduce = stock


@pytest.fixture(scope="module")
def answers(llama: str) -> dict[str, Any]:
    return in_child(paced, model=llama, shares=SHARES)


@pytest.mark.parametrize("name", SHARES)
def test_a_step_reduces_no_more_than_its_share(answers: dict[str, Any], name: str) -> None:
    """Prompt tokens times layers of any step are within the share, or one layer of one prompt."""
    bound = int(SHARES[name] * MAX_BATCHED) * NUM_LAYERS
    for step in answers[name]["steps"]:
        layers = sum(count for _, count in step)
        assert layers == 1 or sum(tokens * count for tokens, count in step) <= bound
    done = sum(count for step in answers[name]["steps"] for _, count in step)
    assert done == NUM_LAYERS * len(PROMPT_LENS)


def test_the_share_spreads_the_reduction(answers: dict[str, Any]) -> None:
    """The smaller the share, the more steps; what a step computes, it may reduce."""
    num_steps = {name: len(found["steps"]) for name, found in answers.items()}
    assert num_steps["a step"] == 1 < num_steps["a quarter"] < num_steps["a sixteenth"]
    assert num_steps["a layer"] == NUM_LAYERS * len(PROMPT_LENS)


@pytest.mark.parametrize("name", SHARES)
def test_who_waits_answers_the_same(answers: dict[str, Any], name: str) -> None:
    """Waiting changes no token, holds the plan and leaks nothing."""
    found = answers[name]
    assert found["tokens"] == answers["a step"]["tokens"]
    assert found["watch"]["problems"] == []
    assert found["watch"]["idle_free"]
    assert found["watch"]["left_over"] == []
    assert (found["watch"]["held_steps"] > 0) == (name != "a step")

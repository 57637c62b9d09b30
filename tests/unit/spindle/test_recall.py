"""models/recall: what it was trained on can be answered, and the shipped weights answer."""

import importlib.util
import json
import random
import sys
from pathlib import Path
from types import ModuleType

import pytest

from vllm_spindle import cli
from vllm_spindle.evaluation import needle

RECALL = Path(__file__).parents[3] / "models" / "recall"


@pytest.fixture
def train(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The recipe as a module, without leaving its neighbours behind."""
    monkeypatch.syspath_prepend(RECALL)
    monkeypatch.delitem(sys.modules, "structure", raising=False)
    spec = importlib.util.spec_from_file_location("recall_train", RECALL / "train.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "recall_train", module)
    spec.loader.exec_module(module)
    monkeypatch.delitem(sys.modules, "structure")
    return module


def _told(tokens: list[str], kinds: list[int]) -> dict[str, list[str]]:
    """Values of every key, from its statements, in the order told."""
    told: dict[str, list[str]] = {}
    for i, token in enumerate(tokens):
        if token == needle.IS and kinds[i] == 0:
            told.setdefault(tokens[i - 1], []).append(tokens[i + 1])
    return told


def _answer(told: dict[str, list[str]], question: list[str]) -> list[str]:
    keys = [token for token in question if token in needle.WORDS]
    if question[-1] == needle.STOP:
        parts = [f"{key} = {told[key][0]}" for key in keys]
        return [*" ? ".join(parts).split(), needle.STOP]
    found = told[keys[0]]
    if len(found) > 1:
        return " : ".join(found).split()
    chain = []
    while found:
        chain.append(found[0])
        found = told.get(found[0], [])
    return " = ".join(chain).split()


@pytest.mark.parametrize("seed", range(5))
def test_training_answers_follow_from_what_was_told(train: ModuleType, seed: int) -> None:
    """A plain loop over the statements, in their order, gives every answer that is trained."""
    tokens, starts, kinds = train.make_sequence(random.Random(seed), 512)
    told, num_asked, seen = _told(tokens, kinds), 0, set()
    for start, end in zip(starts, starts[1:], strict=False):
        if kinds[end - 1] == 0:
            continue
        first = next(i for i in range(start, end) if kinds[i])
        assert tokens[first : end - 1] == _answer(told, tokens[start:first])
        assert tokens[end - 1] == needle.EOS
        seen.add(kinds[first])
        num_asked += 1
    assert num_asked >= 5
    assert len(seen) >= 2


def test_training_is_of_its_own_split(train: ModuleType) -> None:
    """No statement of a training sequence can come in an evaluation."""
    tokens, _, kinds = train.make_sequence(random.Random(1), 512)
    indices = {word: i for i, word in enumerate(needle.WORDS)}
    told = _told(tokens, kinds)
    assert told
    for key, values in told.items():
        for value in values:
            assert needle.split_of((indices[key], indices[value])) == "train"


def test_the_shipped_weights_answer(tmp_path: Path) -> None:
    """Full KV is right on held-out chains, lists and queries, and random eviction is not."""
    argv = ["eval", "--model", str(RECALL), "--methods", "full,random", "--budgets", "0.25"]
    argv += ["--tasks", "multivalue,multiquery,variables", "--lengths", "256"]
    argv += ["--protocols", "question_last", "--num-questions", "8", "--out", str(tmp_path)]
    assert cli.main(argv) == 0
    rows = json.loads((tmp_path / "results.json").read_text())["rows"]
    rights = {row["method"]: [task["accuracy"]["percent"] for task in row["tasks"]] for row in rows}
    assert sum(rights["full"]) / 3 >= 90
    assert sum(rights["random"]) / 3 <= 20

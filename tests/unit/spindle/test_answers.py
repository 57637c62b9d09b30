"""Answers over a reduced cache in transformers."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

import tiny
from vllm_spindle.baselines import ABLATIONS
from vllm_spindle.config import PROFILE_FILE
from vllm_spindle.evaluation.answers import Answerer
from vllm_spindle.hf import compress


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tiny.write_llama(tmp_path_factory.mktemp("llama"), num_layers=2, num_heads=4)
    return LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def _prompt(num_tokens: int) -> list[int]:
    return tiny.prompts(1, [num_tokens])[0]["prompt_token_ids"]


def _generate(model: Any, ids: list[int], num_new: int) -> list[int]:
    prompt = torch.tensor([ids])
    mask = torch.ones_like(prompt)
    out = model.generate(prompt, attention_mask=mask, max_new_tokens=num_new, do_sample=False)
    return out[0, len(ids) :].tolist()


def test_full_answers_are_the_models_own(model: Any) -> None:
    """Nothing reduced: the tokens of `generate`, the question in the prompt or behind it."""
    ids = _prompt(90)
    expected = _generate(model, ids, 6)
    answerer = Answerer(model, method="full", byte_ratio=0.25)
    assert answerer.answer(ids, [[]], 6, ()) == [expected]
    assert answerer.answer(ids[:-4], [ids[-4:]], 6, ()) == [expected]
    assert answerer.true_bytes == answerer.full_bytes == 2 * 86 * 2 * 2 * 32 * 2


def test_followups_are_answered_in_turn(model: Any) -> None:
    """The second question sees the first one and its whole answer, the stop token included."""
    ids, first, second = _prompt(90), _prompt(103)[90:], _prompt(110)[103:]
    answerer = Answerer(model, method="full", byte_ratio=1.0)
    one = _generate(model, ids + first, 5)
    stop = one[3]
    expected = one[: one.index(stop)]
    two = _generate(model, ids + first + [*expected, stop] + second, 5)
    assert answerer.answer(ids, [first, second], 5, {stop}) == [
        expected,
        two[: two.index(stop)] if stop in two else two,
    ]


@pytest.mark.parametrize("method", ["random", "snapkv"])
def test_every_answer_token_sees_the_reduced_cache(model: Any, method: str) -> None:
    """At 40 % bytes even the first token differs for some prompts, and bytes are held."""
    answerer = Answerer(model, method=method, byte_ratio=0.4)
    differ = 0
    for length in range(80, 90):
        ids = _prompt(length)
        [[token]] = answerer.answer(ids, [[]], 1, ())
        differ += token != _generate(model, ids, 1)[0]
        assert 0.4 - 2 / length < answerer.true_bytes / answerer.full_bytes <= 0.4
    assert differ


def test_what_cannot_be_answered_is_refused(model: Any) -> None:
    """Unknown methods, dials and ratios, empty later questions."""
    with pytest.raises(ValueError, match="method must be one of full, random"):
        Answerer(model, method="snapkw", byte_ratio=0.5)
    with pytest.raises(ValueError, match="'snapkv'.*windo"):
        Answerer(model, method="snapkv", byte_ratio=0.5, windo=3)
    with pytest.raises(ValueError, match="byte_ratio must be in"):
        Answerer(model, method="snapkv", byte_ratio=0)
    with pytest.raises(ValueError, match="no later follow-up empty"):
        Answerer(model, method="full", byte_ratio=0.5).answer([1, 2, 3], [[4], []], 2, ())


def test_a_profile_beside_the_model_is_read(model: Any, tmp_path: Path) -> None:
    """Heads keep what the file says, and are alike without it or where that is asked for."""
    shares = {"0.5": [[0.9, 0.7], [0.3, 0.1]]}
    (tmp_path / PROFILE_FILE).write_text(json.dumps({"num_bands": 2, "head_shares": shares}))
    ids = _prompt(300)

    def num_kept(name: str, folder: Path) -> list[list[int]]:
        model.config._name_or_path = str(folder)
        answerer = Answerer(model, method=name, byte_ratio=0.5)
        cache = compress(model, torch.tensor([ids]), answerer.method, 0.5)
        return [layer.reduced.is_there.sum(dim=1).tolist() for layer in cache.layers]

    alike, steep = num_kept("spindle", tmp_path / "nowhere"), num_kept("spindle", tmp_path)
    assert alike[0] == alike[1] == [alike[0][0]] * 2
    assert steep[0][0] > steep[0][1] > steep[1][0] > steep[1][1] > 0
    assert sum(map(sum, alike)) == sum(map(sum, steep))
    assert num_kept("spindle_uniform", tmp_path) == alike


@pytest.mark.parametrize("method", sorted(ABLATIONS))
def test_ablations_answer(model: Any, method: str) -> None:
    """Every part can be taken out; a second reading leaves the bytes as they are."""
    answerer = Answerer(model, method=method, byte_ratio=0.5)
    [answer] = answerer.answer(_prompt(200), [[]], 3, ())
    assert len(answer) == 3
    assert 0.4 < answerer.true_bytes / answerer.full_bytes <= 0.5
    assert answerer.full_bytes == 2 * 200 * 2 * 2 * 32 * 2

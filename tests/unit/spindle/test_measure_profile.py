"""The way down: which heads give up their tokens first, and what is written of it."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

import tiny
from vllm_spindle.calibration.profile import (
    FLOOR,
    LEAST_MEAN,
    Question,
    Shares,
    _less,
    _way_down,
    divergence,
    measure_profile,
    read,
)
from vllm_spindle.cli import main
from vllm_spindle.config import SpindleConfig, read_profile
from vllm_spindle.core.profile import make_profile, mean_share
from vllm_spindle.hf_layers import enable

NUM_LAYERS, NUM_KV_HEADS, HEAD_SIZE = 2, 2, 32
IDLE = (1, 0)  # a head that nothing of the output depends on
NEEDLE = str(Path(__file__).parents[3] / "models/needle")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tiny.write_llama(tmp_path_factory.mktemp("llama"), num_layers=NUM_LAYERS, num_heads=4)
    loaded = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    layer, kv_head = IDLE
    group = slice(kv_head * 2 * HEAD_SIZE, (kv_head + 1) * 2 * HEAD_SIZE)
    with torch.no_grad():
        for each in loaded.model.layers:  # attention matters
            each.self_attn.o_proj.weight *= 8
        loaded.model.layers[layer].self_attn.o_proj.weight[:, group] = 0
    enable(loaded)
    return loaded


@pytest.fixture(scope="module")
def questions() -> list[Question]:
    prompts = [each["prompt_token_ids"] for each in tiny.prompts(4, [150, 201, 170, 160], seed=2)]
    return [
        Question(prompts[0], [[]], 4),
        Question(prompts[1], [[], [5, 6, 7]], 3),
        Question(prompts[2], [[9, 8], [7, 6, 5]], 3),
        Question(prompts[3], [[4]], 5),
    ]


def test_the_cheapest_step_is_taken_without_pricing_all() -> None:
    """The same way as a search that prices every head at every step, in far fewer prices."""
    weights = [[0.11, 3.1, 0.43], [2.3, 0.02, 1.0], [0.57, 0.71, 5.3]]
    prices = 0

    def loss(shares: Shares) -> float:
        nonlocal prices
        prices += 1
        lost = [
            w * (1 - s) ** 2
            for ws, ss in zip(weights, shares, strict=True)
            for w, s in zip(ws, ss, strict=True)
        ]
        return sum(lost) + 0.3 * sum(lost) ** 2  # heads stand in for each other

    start = [[1.0] * 3 for _ in range(3)]
    found = list(_way_down(start, loss))
    lazily, prices = prices, 0
    current, now, expected = start, 0.0, [start]
    while sum(map(sum, current)) / 9 > LEAST_MEAN:
        steps = []
        for layer in range(3):
            for head in range(3):
                share = current[layer][head]
                if share > FLOOR:
                    less = [list(heads) for heads in current]
                    less[layer][head] = _less(share)
                    price = (loss(less) - now) / (share - less[layer][head])
                    steps.append((price, layer, head, less))
        if not steps:
            break
        current = min(steps)[-1]
        now = loss(current)
        expected.append(current)
    assert [shares for shares, _ in found] == expected
    assert lazily < prices / 2


def test_nothing_is_lost_by_keeping_everything(model: Any, questions: list[Question]) -> None:
    """With all tokens the model says what it said; with few it does not."""
    for question in questions:
        asked = read(model, SpindleConfig(), question, set())
        num_answers = len(question.followups) * question.num_new
        assert asked.log_probs.shape[0] == len(asked.rows) == num_answers
        everything = [[1.0] * NUM_KV_HEADS] * NUM_LAYERS
        assert divergence(model, asked, everything) < 1e-6
        assert divergence(model, asked, [[FLOOR] * NUM_KV_HEADS] * NUM_LAYERS) > 1e-4


def test_an_idle_head_gives_up_its_tokens(model: Any, questions: list[Question]) -> None:
    """It keeps least at every mean share; what is written is a profile."""
    steps: list[tuple[float, float]] = []
    points = measure_profile(
        model, SpindleConfig(), questions, trust=1.0, on_step=lambda *step: steps.append(step)
    )
    means = [mean for mean, _ in steps]
    assert means == sorted(means, reverse=True) and means[-1] <= LEAST_MEAN
    assert {0.75, 0.5, 0.25, 0.1} <= set(points)
    for mean in (0.75, 0.5, 0.25):
        shares = {
            (i, k): share for i, heads in enumerate(points[mean]) for k, share in enumerate(heads)
        }
        assert min(shares, key=shares.__getitem__) == IDLE
    for point in make_profile(points):
        assert 0 <= mean_share(point) <= 1


def test_trust_falls_below_a_half(model: Any, questions: list[Question]) -> None:
    """As measured down to a half; from a quarter on all heads alike, if nothing is trusted."""
    measured, wary = (
        measure_profile(model, SpindleConfig(), questions[:1], trust=trust) for trust in (1.0, 0.0)
    )
    assert {0.75, 0.5, 0.25, 0.1} <= set(wary)
    for mean, shares in wary.items():
        here = min(1.0, max(0.0, 4 * mean - 1))
        for found, own in zip(sum(shares, []), sum(measured[mean], []), strict=True):
            assert found == pytest.approx(here * own + (1 - here) * mean, abs=2e-4)


def test_the_command_writes_what_serving_reads(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A profile of the bundled model's shape, from the user's prompts, follow-ups included."""
    lines = [
        "coral lamp fox tulip . " * 30,
        json.dumps(
            {"prompt": "amber moss : oar wolf tin . " * 25, "followups": ["? amber moss ="]}
        ),
    ]
    prompts, out = tmp_path / "prompts.jsonl", tmp_path / "profile.json"
    prompts.write_text("\n".join(lines))
    argv = ["profile", NEEDLE, "--prompts", str(prompts), "--new-tokens", "2", "--out", str(out)]
    assert main(argv) == 0
    assert str(out) in capsys.readouterr().out
    found = read_profile(out)
    assert found.num_bands == 6
    assert all(len(shares) == 6 and len(shares[0]) == 2 for shares in found.head_shares.values())


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--trust", "2"], r"--trust=2.0: must be in \[0, 1\]"),
        (["--lengths", "50"], "--lengths=50: must be numbers of tokens, 128 or more"),
        (["--num-prompts", "0"], "--num-prompts=0: must be at least 1"),
        (["--gqa", "unfold"], "--gqa=unfold"),
        (["--out", "no/such/folder/x.json"], "no/such/folder is no folder"),
        (["--prompts", "nowhere.txt"], "--prompts=nowhere.txt: cannot read it"),
    ],
)
def test_bad_options_are_refused(
    argv: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """In one line that names the option."""
    assert main(["profile", NEEDLE, *argv]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert re.search(message, error)

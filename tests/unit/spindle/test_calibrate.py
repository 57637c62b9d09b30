"""Calibration: the choice rule, the measures against oracles, and the plan that serving loads."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
from vllm_spindle import cli
from vllm_spindle.calibration.attention import attend
from vllm_spindle.calibration.capture import CapturedPrompt, capture, load_model, replay
from vllm_spindle.calibration.choice import choose_method, choose_whole
from vllm_spindle.calibration.measure import METHODS, BandMeasure, Bench, WholeMeasure
from vllm_spindle.calibration.plan_file import plan_text
from vllm_spindle.calibration.reduce import cover_sizes, dense, reduce_layer
from vllm_spindle.calibration.unfolded import unfold_layer
from vllm_spindle.config import PROFILE_FILE, SpindleConfig, load_config
from vllm_spindle.core.reference import attend_reduced
from vllm_spindle.policy import SpindlePolicy

NUM_LAYERS = 3
PROMPT_LEN = 300


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A random model: its layer 0 depends on token ids alone, like any decoder's."""
    return str(tiny.write_llama(tmp_path_factory.mktemp("tiny"), num_layers=NUM_LAYERS))


@pytest.fixture(scope="module")
def model(folder: str) -> Any:
    return load_model(folder, "float32")


def few_words(num_prompts: int, num_words: int = 12) -> list[list[int]]:
    """Prompts that say the same few words over and over."""
    generator = torch.Generator().manual_seed(3)
    return torch.randint(5, 5 + num_words, (num_prompts, PROMPT_LEN), generator=generator).tolist()


@pytest.fixture(scope="module")
def captured(model: Any) -> CapturedPrompt:
    return capture(model, few_words(1)[0], PROMPT_LEN, 4)


def policy(**options: Any) -> SpindlePolicy:
    config = SpindleConfig(**{"keep_ratio": 0.5, "num_bands": NUM_LAYERS, **options})
    return SpindlePolicy(config, NUM_LAYERS, 32, 4)


def measures(evict: float, merge: float, both: float) -> dict[Any, BandMeasure]:
    errors = zip(METHODS, (evict, merge, both), strict=True)
    return {method: BandMeasure(method, 9.0, error, 9.0, 0.0, 4.0) for method, error in errors}


@pytest.mark.parametrize(
    ("errors", "chosen"),
    [
        ((0.3, 0.2, 0.4), "merge"),
        ((0.3, 0.4, 0.2), "both"),
        ((0.2, 0.3, 0.3), "evict"),
        ((0.2, 0.2, 0.2), "evict"),
        ((0.300, 0.290, 0.295), "evict"),  # better by less than the margin
        ((0.003, 0.0, 0.0), "evict"),  # by less than bf16 rounds
        ((0.01, 0.0, 0.0), "merge"),  # of equals the first
    ],
)
def test_a_band_evicts_unless_clearly_beaten(errors: tuple[float, ...], chosen: str) -> None:
    """The least error at the answer's queries wins, past margin and rounding."""
    assert choose_method(measures(*errors)) == chosen


def test_a_plan_must_hold_as_a_whole() -> None:
    """Bands that chose well one by one lose where the whole diverges; noise changes nothing."""
    mixed = WholeMeasure(("merge", "evict"), 0.0009, 1.0)
    evicted = WholeMeasure(("evict", "evict"), 0.0001, 1.0)
    assert choose_whole([mixed, evicted]) is mixed
    worse = WholeMeasure(("merge", "evict"), 0.5, 1.0)
    assert choose_whole([worse, evicted]) is evicted


def test_attention_equals_the_reference(captured: CapturedPrompt) -> None:
    """Over evicted context, the vectorised attention is the slow one's."""
    chosen = policy()
    plan = chosen.plan(PROMPT_LEN)[1]
    layer = captured.layers[1]
    reduced = reduce_layer(chosen, "evict", plan, captured, 1)
    start = reduced.num_context
    assert reduced.context[0].shape[1] == plan.reduced_blocks * 32 < start
    tail = (layer.keys[:, start:], layer.values[:, start:])
    queries = layer.queries[:, :, start - layer.keys.shape[1] :]
    found = attend(queries, *reduced.context, *tail, layer.scale)
    kept = torch.stack(
        [
            torch.tensor([int((own == key).all(dim=-1).nonzero()[0]) for key in context])
            for own, context in zip(layer.keys, reduced.context[0], strict=True)
        ]
    )
    expected = attend_reduced(
        queries.flatten(0, 1).transpose(0, 1),
        layer.keys.transpose(0, 1),
        layer.values.transpose(0, 1),
        kept,
        num_context=start,
        scale=layer.scale,
    )
    found = found.flatten(0, 1).transpose(0, 1)
    assert len(found) == PROMPT_LEN - start + len(captured.answer)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_a_replay_over_whole_contexts_is_the_model(model: Any, captured: CapturedPrompt) -> None:
    """Nothing reduced: the answer's logits are the model's own, up to the cache's rounding."""
    contexts = [dense(layer.keys[:, :0], layer.values[:, :0]) for layer in captured.layers]
    logits = replay(model, captured, contexts, [0] * NUM_LAYERS)
    assert logits.shape == captured.logits.shape
    assert (logits - captured.logits).abs().max() < 0.05 * captured.logits.abs().max()
    assert torch.equal(logits.argmax(dim=-1), captured.logits.argmax(dim=-1))


def test_layer_0_is_exact_in_as_many_entries_as_words(model: Any, captured: CapturedPrompt) -> None:
    """Twelve words: layer 0 needs twelve entries at most, and merging it changes nothing."""
    chosen = policy(key_share=0.5)
    cover = cover_sizes(chosen, captured, 0)
    assert max(*cover.keys, *cover.values) <= 12 / PROMPT_LEN
    merged = Bench(model, [captured], chosen).band(0, "merge")
    assert merged.overflow == 0
    assert merged.answer_error < 0.02


def test_one_table_for_all_heads_is_no_larger(captured: CapturedPrompt) -> None:
    """Scope layer: the same words, but each kv head's vectors are its own."""
    for layer_idx in range(NUM_LAYERS):
        cover = cover_sizes(policy(), captured, layer_idx)
        for shared, own in (
            (cover.layer_keys, cover.keys),
            (cover.layer_values, cover.values),
        ):
            # Windows hold fewer tokens of each head: a cover may come out a little larger.
            assert 0 < shared <= 1.1 * sum(own) / len(own)


def test_the_papers_route_is_byte_counted(captured: CapturedPrompt) -> None:
    """Copies are absorbed: layer 0 stays exact; their codes are paid for, and by the paper not."""
    chosen = policy()
    for layer_idx, plan in enumerate(chosen.plan(PROMPT_LEN)):
        found = unfold_layer(chosen, plan, captured, layer_idx)
        # An index and a norm for each of G = 4 copies of key and value, D = 32, and a position.
        codes = plan.reduced_blocks / plan.tail_block * 4 * (2 * 4 + 4) / (2 * 32 * 2)
        entries = found.true_ratio - codes
        assert 0 < entries <= plan.reduced_blocks / plan.tail_block * 4
        # Eq. 15: entries of the unfolded cache, each with an index and a norm.
        assert found.paper_ratio == pytest.approx(entries / 4 * (1 + 2 / 32))
        if layer_idx == 0:  # twelve keys and twelve values of each kv head
            assert entries <= 24 / (2 * plan.tail_block * 32) + 1e-9


def calibrate(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str, str]:
    try:
        code = cli.main(["calibrate", *argv])
    except SystemExit as stop:
        code = stop.code
    return code, *capsys.readouterr()


def test_the_plan_is_what_serving_loads(
    folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """File in, file out: layer 0 alone in its band, merged by measurement, read back the same."""
    prompts, plan = tmp_path / "prompts.jsonl", tmp_path / "plan.yaml"
    lines = [json.dumps({"prompt_token_ids": ids}) for ids in few_words(2)]
    prompts.write_text("\n".join(lines), encoding="utf-8")
    argv = [folder, "--prompts", str(prompts), "--out", str(plan), "--keep-ratio", "0.5"]
    argv += ["--num-bands", "3", "--key-share", "0.5", "--new-tokens", "4"]
    code, out, _ = calibrate(capsys, *argv, "--json")
    report = json.loads(out)
    assert code == 0
    assert report["bands"][0]["methods"]["merge"]["answer_error"] < 0.02
    assert report["bands"][0]["methods"]["evict"]["answer_error"] > 0.02
    assert report["bands"][0]["chosen"] in ("merge", "both")
    config = load_config(plan)
    assert config.model_dump(mode="json") == report["config"]
    assert (config.keep_ratio, config.num_bands, config.key_share) == (0.5, 3, 0.5)
    assert list(config.band_methods) == [band["chosen"] for band in report["bands"]]
    text = plan.read_text(encoding="utf-8")
    assert all(part in text for part in (str(prompts), folder, "0-0", "KL", "# Run:"))
    code, out, _ = calibrate(capsys, *argv)
    assert code == 0
    assert str(plan) in out.replace("\n", "")


@pytest.mark.parametrize(("num_words", "theta", "wins"), [(12, "0.95", False), (200, "1.0", True)])
def test_eviction_by_the_profile_competes(
    folder: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    num_words: int,
    theta: str,
    wins: bool,
) -> None:
    """Where it moves the answers least, the plan leaves the heads to the profile.

    Few words: layer 0 merges without loss, and no eviction comes near. Nothing alike: none merges.
    """
    model = shutil.copytree(folder, tmp_path / "model")
    shares = tiny.head_shares(num_layers=NUM_LAYERS, num_heads=2)
    (model / PROFILE_FILE).write_text(json.dumps({"head_shares": shares}), encoding="utf-8")
    prompts = tmp_path / "prompts.jsonl"
    lines = [json.dumps({"prompt_token_ids": ids}) for ids in few_words(2, num_words)]
    prompts.write_text("\n".join(lines), encoding="utf-8")
    argv = [str(model), "--prompts", str(prompts), "--keep-ratio", "0.5", "--num-bands", "3"]
    argv += ["--key-share", "0.5", "--theta-key", theta, "--theta-value", theta]
    code, out, _ = calibrate(capsys, *argv, "--new-tokens", "4", "--json")
    report = json.loads(out)
    *others, measured = report["wholes"]
    assert code == 0
    assert measured["budget"] == "measured" and all("budget" not in each for each in others)
    assert (measured["divergence"] < min(each["divergence"] for each in others)) == wins
    config = load_config(report["config"])
    assert (config.budget == "auto" and config.band_methods is None) == wins


def test_every_plan_survives_its_file(tmp_path: Path) -> None:
    """Any configuration that calibration can make is loaded as it was."""
    report: dict[str, Any] = {
        "model": "M",
        "source": "S",
        "num_prompts": 1,
        "shortest_prompt": 1,
        "longest_prompt": 2,
        "block_size": 32,
        "bands": [],
        "wholes": [],
        "covers": [{"keys": [0.2, 0.4], "values": [1.0]}],
    }
    by_profile = SpindleConfig(keep_ratio=0.3)
    path = tmp_path / "plan.yaml"
    path.write_text(plan_text(by_profile, report, "command", str(path)), encoding="utf-8")
    assert load_config(path) == by_profile
    assert "#   keys    0.30" in path.read_text(encoding="utf-8")
    for methods in (("evict",), ("merge", "both", "evict")):
        config = SpindleConfig(
            keep_ratio=0.15, num_bands=len(methods), band_methods=methods, theta_key=0.9
        )
        path.write_text(plan_text(config, report, "command", str(path)), encoding="utf-8")
        assert load_config(path) == config


RECALL = Path(__file__).parents[3] / "models" / "recall"


def test_another_dialect_of_the_same_words_needs_prompts(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """models/recall shares models/needle's words, and would not understand its questions."""
    assert cli.main(["calibrate", str(RECALL)]) == 2
    said = capsys.readouterr().err
    assert "--prompts" in said and said.count("\n") == 1


@pytest.mark.parametrize(
    ("argv", "parts"),
    [
        ([], ["--prompts", "models/needle"]),
        (["--prompts", "none.txt"], ["none.txt"]),
        (["--num-bands", "x"], ["--num-bands=x", "3,6"]),
        (["--num-bands", "7"], ["num_bands=7", "3 layers"]),
        (["--keep-ratio", "1.0"], ["--keep-ratio=1.0", "below 1"]),
        (["--gqa", "unfold"], ["--gqa=unfold", "union"]),
        (["--new-tokens", "0"], ["--new-tokens=0", "at least 1"]),
        (["--band-methods", "evict"], ["--band-methods"]),
        (["--prompts", "text"], ["line 1", "no tokenizer"]),
        (["--prompts", "short"], ["prompt 1", "3 tokens"]),
        (["--prompts", "wrong"], ["line 2", "prompt_token_ids"]),
        (["--prompts", "empty"], ["no prompts"]),
    ],
    ids=str,
)
def test_a_users_error_is_one_line(
    folder: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    argv: list[str],
    parts: list[str],
) -> None:
    """Exit code 2 and one line that names what to mend, before the model is loaded."""
    files = {
        "text": "once upon a time\n",
        "short": '{"prompt_token_ids": [1, 2, 3]}\n',
        "wrong": '\n{"question": 1}\n',
        "empty": "\n\n",
    }
    for name, text in files.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    code, _, errors = calibrate(capsys, folder, *argv)
    assert code == 2
    assert errors.count("\n") == 1
    assert [part for part in parts if part not in errors] == []

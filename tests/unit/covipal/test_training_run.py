"""Training runs on tiny random models: every family, killed and resumed, and what they leave."""

import csv
import dataclasses
import errno
import json
import os
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny_lvlm
from vllm_covipal import cli
from vllm_covipal.core.fingerprint import fingerprint
from vllm_covipal.core.pruner_files import load_pruning_module
from vllm_covipal.training import loop
from vllm_covipal.training.recipe import StageRecipe, TrainRecipe, leaves, load_recipe
from vllm_covipal.training.samples import Sample, Source, Turn

ROOT = Path(__file__).parents[3]
RECIPES = sorted((ROOT / "configs" / "covipal").glob("train_*.yaml"))
SHAPES = ROOT / "configs" / "covipal" / "train_shapes.yaml"
STEPS = 4


class Pictures(Source):
    """Twelve random pictures, two questions about each."""

    types = ("",)

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> Sample:
        turns = (
            Turn("<image>\nwhat is the color ?", "blue" if index % 2 else "red"),
            Turn("<image>\nis red left of the square ?", "right"),
        )
        return Sample(str(index), (tiny_lvlm.picture(48, 32 + index, seed=index),), turns)


@cache
def _pair(family: str) -> tuple[Any, Any]:
    model, processor = tiny_lvlm.FAMILIES[family]()
    return model.requires_grad_(False), processor


def _recipe(out: Path, **changes: Any) -> TrainRecipe:
    stage = {"num_steps": STEPS, "pictures": 2, "questions": 2}
    values = {
        "model": "tiny",
        "out": str(out),
        "data": {"kind": "shapes"},
        "checkpoint_steps": 2,
        "stage1": stage,
        "stage2": stage | {"keep_ratio": [0.25, 0.5]},
    }
    return TrainRecipe.model_validate(values | changes)


def _train(family: str, recipe: TrainRecipe, **options: Any) -> Any:
    model, processor = _pair(family)
    accelerator = loop.make_accelerator(recipe)
    source = options.pop("source", None) or Pictures()
    return loop.train(recipe, model, processor, source, accelerator, **options)


def _curve(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("family", tiny_lvlm.FAMILIES)
def test_both_stages_run_on_every_family(tmp_path: Path, family: str) -> None:
    """A module for that very model, curves of both stages, what made it; the model untouched."""
    model, _ = _pair(family)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    module = _train(family, _recipe(tmp_path), model_name="tiny")
    loaded = load_pruning_module(tmp_path, fingerprint=fingerprint(model.config))
    for name, weight in loaded.state_dict().items():
        assert torch.equal(weight, module.state_dict()[name]), name
    first = load_pruning_module(tmp_path / "stage1")
    changed = [
        n for n, w in loaded.state_dict().items() if not torch.equal(w, first.state_dict()[n])
    ]
    assert changed, "stage 2 changes the module"
    assert [row["step"] for row in _curve(tmp_path / "stage1.csv")] == list("0123")
    assert {"loss", "lm", "budget", "hard_soft_overlap"} < set(_curve(tmp_path / "stage2.csv")[0])
    made_by = json.loads((tmp_path / "provenance.json").read_text(encoding="utf-8"))
    assert made_by["recipe"]["stage2"]["keep_ratio"] == [0.25, 0.5]
    assert made_by["versions"]["torch"] == torch.__version__
    assert made_by["seconds"]["clock"] > 0 and made_by["seconds"]["goes_on_from"] is None
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())


@pytest.mark.parametrize("mask", ["budgeted", "straight_through"])
@pytest.mark.parametrize("noise", [0.0, 1.0])
def test_other_masks_train(tmp_path: Path, mask: str, noise: float) -> None:
    """The gradient reaches the module through the frozen model."""
    stage2 = {"num_steps": 2, "pictures": 2, "mask": mask, "noise": noise, "keep_ratio": [0.25]}
    stage1 = {"num_steps": 0}
    recipe = _recipe(tmp_path, stage1=stage1, stage2=stage2 | {"learning_rate": 1e-2})
    start = loop._new_module(recipe, _pair("llava")[0], "").state_dict()
    module = _train("llava", recipe)
    name = "blocks.0.query.weight"
    assert not torch.equal(module.state_dict()[name], start[name])


@pytest.mark.parametrize("mask", ["budgeted", "straight_through", "sigmoid"])
def test_a_step_that_keeps_everything_is_a_step(tmp_path: Path, mask: str) -> None:
    """A budget of 1 may be all that a step draws, and a picture may be one token."""
    stage2 = {"num_steps": 2, "pictures": 1, "mask": mask, "keep_ratio": [1.0]}
    module = _train("llava", _recipe(tmp_path, stage1={"num_steps": 0}, stage2=stage2))
    assert all(weight.isfinite().all() for weight in module.parameters())
    assert _curve(tmp_path / "stage2.csv")[1]["hard_soft_overlap"] == "1" or mask == "sigmoid"


def test_stage_2_can_hold_on_to_the_labels(tmp_path: Path) -> None:
    """Stage 1's loss is shown and added at its weight; without one it is not computed."""
    rows = {}
    for name, weight in (("without", 0.0), ("with", 3.0)):
        stage2 = {"num_steps": 1, "pictures": 2, "keep_ratio": [0.25], "label_weight": weight}
        _train("llava", _recipe(tmp_path / name, stage1={"num_steps": 0}, stage2=stage2))
        rows[name] = {k: float(v) for k, v in _curve(tmp_path / name / "stage2.csv")[0].items()}
    assert "mse" not in rows["without"] and rows["with"]["mse"] > 0
    added = rows["with"]["loss"] - rows["without"]["loss"]
    assert added == pytest.approx(3 * rows["with"]["mse"], rel=1e-3)


class Killed(Exception):
    """What a kill is to the run."""


@pytest.mark.parametrize("kill_at", [(1, 1), (1, 3), (2, 1), (2, 3)])
def test_a_killed_run_goes_on_as_it_would_have(tmp_path: Path, kill_at: tuple[int, int]) -> None:
    """Same curves, same weights, whatever step of whichever stage it died at."""

    def kill(stage: int, done: int, total: int, shown: dict[str, float]) -> None:
        if (stage, done) == kill_at:
            raise Killed

    whole = _train("llava", _recipe(tmp_path / "whole", stage2=_noisy()))
    recipe = _recipe(tmp_path / "killed", stage2=_noisy())
    with pytest.raises(Killed):
        _train("llava", recipe, report=kill)
    taken: list[tuple[int, int]] = []
    torch.manual_seed(99)  # of no account
    resumed = _train("llava", recipe, report=lambda stage, done, *_: taken.append((stage, done)))
    assert taken[0] == ((1, 1) if kill_at == (1, 1) else (kill_at[0], kill_at[1] // 2 * 2 + 1))
    for stage in (1, 2):
        name = f"stage{stage}.csv"
        assert _curve(tmp_path / "killed" / name) == _curve(tmp_path / "whole" / name)
    for name, weight in whole.state_dict().items():
        assert torch.equal(weight, resumed.state_dict()[name]), name


def test_a_gradient_scaler_goes_on_as_it_would_have(tmp_path: Path) -> None:
    """Its scale, and the steps since it last grew, are in the checkpoint (fp16)."""

    def scaled(name: str, **options: Any) -> Any:
        recipe = _recipe(tmp_path / name)
        accelerator = loop.make_accelerator(recipe)
        # As accelerate's of fp16, which it has on a GPU alone.
        accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=64.0, growth_interval=3)
        loop.train(recipe, *_pair("llava"), Pictures(), accelerator, **options)
        return accelerator.scaler.state_dict()

    def kill(stage: int, done: int, total: int, shown: dict[str, float]) -> None:
        if (stage, done) == (2, 2):
            raise Killed

    whole = scaled("whole")
    with pytest.raises(Killed):
        scaled("killed", report=kill)
    assert scaled("killed") == whole and whole["scale"] > 64


def test_a_run_killed_between_the_stages_leaves_stage_1(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its checkpoint is the last thing that is written of it, so what goes on finds all of it."""
    recipe = _recipe(tmp_path)
    stock = loop.checkpoint.save_checkpoint

    def save_and_die(out: Path, progress: Any, *args: Any) -> None:
        stock(out, progress, *args)
        if (progress.stage, progress.step) == (1, STEPS):
            raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(loop.checkpoint, "save_checkpoint", save_and_die)
        with pytest.raises(Killed):
            _train("llava", recipe)
    _train("llava", recipe)
    load_pruning_module(tmp_path / "stage1")
    made_by = json.loads((tmp_path / "stage1" / "provenance.json").read_text(encoding="utf-8"))
    assert made_by["progress"]["step"] == STEPS


def _noisy() -> dict[str, Any]:
    return {"num_steps": STEPS, "pictures": 2, "noise": 1.0, "keep_ratio": [0.25, 0.5]}


def test_another_seed_is_another_run(tmp_path: Path) -> None:
    """And the same seed the same module, to the bit, noise included."""
    weights, losses = [], []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        torch.manual_seed(len(weights))  # of no account
        module = _train("llava", _recipe(tmp_path / name, seed=seed, stage2=_noisy()))
        weights.append(torch.cat([weight.flatten() for weight in module.state_dict().values()]))
        losses.append([row["loss"] for row in _curve(tmp_path / name / "stage2.csv")])
    assert losses[0] == losses[1] != losses[2]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


def test_a_folder_of_another_recipe_is_refused(tmp_path: Path) -> None:
    """Before anything is overwritten; --restart is the way."""
    _train("llava", _recipe(tmp_path))
    with pytest.raises(ValueError, match=r"of another recipe: .*--restart"):
        _train("llava", _recipe(tmp_path, seed=5))
    _train("llava", _recipe(tmp_path, seed=5), restart=True)


def test_edited_data_are_noticed(tmp_path: Path) -> None:
    """A run goes on from data of the same contents alone, wherever they lie."""

    class Edited(Pictures):
        digest = "b"

    pictures = Pictures()
    pictures.digest = "a"
    _train("llava", _recipe(tmp_path, stage2={"num_steps": 0}), source=pictures)
    with pytest.raises(ValueError, match=r"of other data: .*has changed.*--restart"):
        _train("llava", _recipe(tmp_path), source=Edited())
    _train("llava", _recipe(tmp_path), source=pictures)
    _train("llava", _recipe(tmp_path), source=Edited(), restart=True)
    made_by = json.loads((tmp_path / "provenance.json").read_text(encoding="utf-8"))
    assert made_by["data_digest"] == "b"


def test_unreadable_pictures_are_found_before_the_first_step(tmp_path: Path) -> None:
    """Those of the steps that are left, once each, all counted in one line."""

    class Unreadable(Pictures):
        asked: list[int] = []  # noqa: RUF012

        def unreadable(self, indices: Any, *, whole: bool) -> Any:
            assert not whole
            self.asked[:] = indices
            return iter(["line 3: no", "line 7: no"] if self.broken else [])

    source, steps = Unreadable(), []
    source.broken = True
    recipe = _recipe(tmp_path)
    with pytest.raises(ValueError, match=r"^line 3: no; and 1 more picture .*--check"):
        _train("llava", recipe, source=source, report=lambda *step: steps.append(step))
    assert not steps and len(source.asked) == 2 * STEPS * 2
    source.broken = False
    _train("llava", recipe, source=source)
    _train("llava", recipe, source=source)
    assert not source.asked, "nothing is left to draw"


def test_another_stage_2_follows_a_stage_1_that_is_done(tmp_path: Path) -> None:
    """Without taking it again; the curves are those of one run."""
    _train("llava", _recipe(tmp_path / "a", stage2={"num_steps": 0}))
    taken: list[tuple[int, int]] = []
    _train(
        "llava", _recipe(tmp_path / "a"), report=lambda stage, done, *_: taken.append((stage, done))
    )
    assert taken[0] == (2, 1)
    _train("llava", _recipe(tmp_path / "b"))
    for name in ("stage1.csv", "stage2.csv"):
        assert _curve(tmp_path / "a" / name) == _curve(tmp_path / "b" / name)


@pytest.mark.parametrize(
    ("num_steps", "warmup_steps"), [(1, 0), (2, 0), (10, 0), (10, 1), (10, 4), (10, 9)]
)
def test_the_rate_rises_once_and_ends_where_it_is_to_end(num_steps: int, warmup_steps: int) -> None:
    """The highest at the last step of the rise and there alone, the final one at the last step."""
    recipe = StageRecipe(
        num_steps=num_steps, warmup_steps=warmup_steps, learning_rate=1.0, final_learning_rate=0.25
    )
    rates = [loop.learning_rate(recipe, step) for step in range(num_steps)]
    highest = max(0, warmup_steps - 1)
    assert [step for step, rate in enumerate(rates) if rate == 1.0] == [highest]
    assert rates[:highest] == [(step + 1) / warmup_steps for step in range(highest)]
    falling = rates[highest:]
    assert falling == sorted(falling, reverse=True)
    if num_steps > 1:
        assert rates[-1] == pytest.approx(0.25)


def test_a_loss_that_is_no_number_ends_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before it is written down or into a checkpoint: what was good goes on."""
    stock, broken = loop.stages.stage1_step, [3]

    def step(*args: Any) -> Any:
        outcome = stock(*args)
        broken[0] -= 1
        return dataclasses.replace(
            outcome, loss=outcome.loss * float("nan" if not broken[0] else 1)
        )

    monkeypatch.setattr(loop.stages, "stage1_step", step)
    recipe = _recipe(tmp_path, stage2={"num_steps": 0})
    with pytest.raises(RuntimeError, match=r"stage 1, step 2: the loss is nan.*learning_rate"):
        _train("llava", recipe)
    assert len(_curve(tmp_path / "stage1.csv")) == 2
    module = _train("llava", recipe)
    assert all(weight.isfinite().all() for weight in module.parameters())


def test_two_runs_in_one_folder_are_refused(tmp_path: Path) -> None:
    """While the other runs; what it wrote is left alone."""
    recipe = _recipe(tmp_path, stage2={"num_steps": 0})
    refused = []

    def second(stage: int, done: int, total: int, shown: dict[str, float]) -> None:
        with pytest.raises(ValueError, match="another training") as said:
            _train("llava", recipe, restart=True)
        refused.append(str(said.value))

    _train("llava", recipe, report=second)
    assert len(refused) == STEPS and str(tmp_path) in refused[0]
    assert (tmp_path / "checkpoints" / f"stage1-00000{STEPS}").is_dir()


def test_a_full_disk_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the checkpoint before it is whole: the run goes on once there is room."""
    recipe = _recipe(tmp_path, stage2={"num_steps": 0})

    def full(state: Any, path: Path) -> None:
        if "partial" in str(path) and (tmp_path / "checkpoints" / "stage1-000002").is_dir():
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        stock(state, path)

    stock = torch.save
    with monkeypatch.context() as patched:
        patched.setattr(torch, "save", full)
        with pytest.raises(RuntimeError, match=r"cannot write .*checkpoints.*No space left"):
            _train("llava", recipe)

    def append(*args: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(loop.Curve, "append", append)
        with pytest.raises(RuntimeError, match=r"cannot write .*stage1\.csv .*No space left"):
            _train("llava", recipe)
    taken: list[int] = []
    _train("llava", recipe, report=lambda stage, done, *_: taken.append(done))
    assert taken == [3, 4]


def test_a_checkpoint_that_is_not_whole_is_named(tmp_path: Path) -> None:
    """Somebody removed a part of it: the folder and what to do."""
    _train("llava", _recipe(tmp_path, stage2={"num_steps": 0}))
    folder = tmp_path / "checkpoints" / "stage1-000004"
    for name in ("optimizer.pt", "model.safetensors", "state.json"):
        (folder / name).write_bytes(b"{")
        with pytest.raises(ValueError, match=rf"{folder} is no whole checkpoint .*--restart"):
            _train("llava", _recipe(tmp_path, stage2={"num_steps": 0}))


def test_stage_1_learns(tmp_path: Path) -> None:
    """On pictures that come again and again the error falls."""
    stage = {"num_steps": 30, "pictures": 4, "questions": 2, "learning_rate": 5e-3}
    recipe = _recipe(tmp_path, stage1=stage, stage2={"num_steps": 0})
    _train("llava", recipe)
    losses = [float(row["loss"]) for row in _curve(tmp_path / "stage1.csv")]
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_shipped_recipe_is_valid(path: Path) -> None:
    """And its header says how to run it."""
    load_recipe(path)
    header = path.read_text(encoding="utf-8")
    assert f"vllm-covipal train --config configs/covipal/{path.name}" in header


def test_a_dial_is_overridden_by_its_dotted_name() -> None:
    """Values are YAML; a wrong one is named."""
    path = SHAPES
    recipe = load_recipe(path, {"stage1.num_steps": "7", "stage2.keep_ratio": "[0.5]"})
    assert recipe.stage1.num_steps == 7 and recipe.stage2.keep_ratio == (0.5,)
    assert {"seed", "stage2.mask", "module.width", "data.path"} <= set(leaves())
    for name, value, words in (
        ("stage1.rows", "all", "stage1.rows='all'"),
        ("stage3.x", "1", "unknown key 'stage3'"),
        ("stage2.keep_ratio", "[2]", "stage2.keep_ratio.0=2"),
    ):
        with pytest.raises(ValueError, match="train_") as refusal:
            load_recipe(path, {name: value})
        assert words in str(refusal.value)


@pytest.mark.parametrize("text", ["no", "'no'", "bf16"])
def test_no_mixed_precision_is_a_word(tmp_path: Path, text: str) -> None:
    """YAML takes a bare ``no`` for false."""
    recipe = load_recipe(SHAPES, {"mixed_precision": text})
    assert recipe.mixed_precision == text.strip("'")
    with pytest.raises(ValueError, match="mixed_precision=True"):
        load_recipe(SHAPES, {"mixed_precision": "yes"})


def test_overrides_of_another_form_are_one_line(tmp_path: Path) -> None:
    """A section that is no section, and a value that is no YAML."""
    path = tmp_path / "recipe.yaml"
    text = SHAPES.read_text(encoding="utf-8")
    path.write_text(text + "\ninit: folder\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"--init\.width: init is no section"):
        load_recipe(path, {"init.width": "64"})
    with pytest.raises(ValueError, match=r"--stage2\.keep_ratio: not valid YAML"):
        load_recipe(path, {"stage2.keep_ratio": "[0.5"})
    path.write_bytes(b"model: \xff\n")
    with pytest.raises(ValueError, match=rf"{path}: not valid YAML: .*decode"):
        load_recipe(path)
    # A section without a value is an empty one.
    path.write_text("data:\n", encoding="utf-8")
    with pytest.raises(ValueError, match="model is missing"):
        load_recipe(path, {"data.kind": "shapes"})


def test_the_command_trains_from_a_file(tmp_path: Path, capsys: Any) -> None:
    """From a model's folder and samples in the LLaVA format to a module that serving loads."""
    model = tiny_lvlm.write("llava", tmp_path / "model")
    samples = tiny_lvlm.write_samples(tmp_path, 3)
    out = tmp_path / "out"
    arguments = ["train", "--config", str(SHAPES), "--model", str(model), "--out", str(out)]
    arguments += ["--data.kind", "jsonl", "--data.path", str(samples)]
    arguments += ["--data.images", str(tmp_path), "--stage1.num_steps", "1"]
    arguments += ["--stage1.guide_layer", "1", "--stage2.num_steps", "1"]
    arguments += ["--stage2.type_weights", "{}"]  # the file's samples have no types
    assert cli.main(arguments) == 0
    assert load_pruning_module(out).config.trained_for == "model"
    made_by = json.loads((out / "provenance.json").read_text(encoding="utf-8"))
    assert made_by["recipe"]["data"]["kind"] == "jsonl"
    assert "stage 2 1/1" in capsys.readouterr().out


def test_the_command_checks_every_picture(tmp_path: Path, capsys: Any) -> None:
    """Without a model and without a step: a line for each that cannot be read, exit code 2."""
    samples = tiny_lvlm.write_samples(tmp_path, 3)
    arguments = ["train", "--config", str(SHAPES), "--out", str(tmp_path / "out"), "--check"]
    arguments += ["--data.kind", "jsonl", "--data.path", str(samples), "--model", "nowhere"]
    arguments += ["--data.images", str(tmp_path), "--stage2.type_weights", "{}"]
    assert cli.main(arguments) == 0
    assert "3 samples, every picture can be read" in capsys.readouterr().out
    whole = (tmp_path / "1.png").read_bytes()
    (tmp_path / "1.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "2.png").unlink()
    assert cli.main(arguments) == 2
    said = capsys.readouterr()
    lines = said.out.splitlines()
    assert "line 2: cannot read the image" in lines[0] and "line 3: cannot" in lines[1]
    assert "2 pictures cannot be read" in said.err and said.err.count("\n") == 1
    assert cli.main([*arguments, "--stage2.type_weights", "{chart: 2}"]) == 2
    assert "no sample is of type 'chart'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_what_is_wrong_with_a_run_is_one_line(tmp_path: Path, capsys: Any) -> None:
    """Exit code 2: recipe, samples, model, guide layer."""
    model = tiny_lvlm.write("llava", tmp_path / "model")
    capsys.readouterr()  # a bar of transformers', unless a test before this one turned bars off
    run = ["train", "--config", str(SHAPES), "--out", str(tmp_path / "out")]
    for arguments, words in (
        (["--stage2.mask", "soft"], "stage2.mask='soft'"),
        (["--data.kind", "jsonl"], "kind 'jsonl' needs a path"),
        (["--model", str(tmp_path / "none")], "transformers cannot load it"),
        (["--model", str(model), "--stage1.guide_layer", "2"], "guide_layer must be in [0, 2)"),
        (["--model", str(model), "--out", str(tmp_path / "model" / "config.json")], "cannot make"),
    ):
        assert cli.main([*run, *arguments]) == 2
        said = capsys.readouterr().err
        assert words in said and said.count("\n") == 1


def test_weights_of_unknown_types_are_refused(tmp_path: Path) -> None:
    """Before anything is trained, with what there is instead."""
    recipe = _recipe(tmp_path)
    stage = recipe.stage2.model_copy(update={"type_weights": {"counting": 4.0}})
    with pytest.raises(ValueError, match=r"stage2\.type_weights: .* 'counting'; the data have"):
        _train("llava", recipe.model_copy(update={"stage2": stage}))
    assert not list(tmp_path.iterdir())


def test_the_module_records_how_much_text_it_was_trained_to_read(tmp_path: Path) -> None:
    """The recipe's word; a start from another module keeps that one's where the recipe has none."""
    short = {"stage1": {"num_steps": 1}, "stage2": {"num_steps": 0}}
    _train("llava", _recipe(tmp_path / "one", max_text_tokens=3, **short))
    assert load_pruning_module(tmp_path / "one").config.max_text_tokens == 3
    start = short | {"init": str(tmp_path / "one")}
    _train("llava", _recipe(tmp_path / "two", **start))
    assert load_pruning_module(tmp_path / "two").config.max_text_tokens == 3
    # And reads as much: the first step's loss is the same.
    _train("llava", _recipe(tmp_path / "three", max_text_tokens=3, **start))
    _train("llava", _recipe(tmp_path / "four", max_text_tokens=128, **start))
    assert load_pruning_module(tmp_path / "four").config.max_text_tokens == 128
    losses = [_curve(tmp_path / n / "stage1.csv")[0]["loss"] for n in ("two", "three", "four")]
    assert losses[0] == losses[1] != losses[2]


def test_a_start_from_another_module_takes_the_recipe_s_dials(tmp_path: Path) -> None:
    """What no training depends on is changed; a size that it does not have is refused."""
    first = _recipe(tmp_path / "one", module={"width": 64, "num_blocks": 1})
    _train("llava", first)
    init = {"init": str(tmp_path / "one")}
    module = {"spread_share": 0.3, "spread_by": "diverse", "num_blocks": 1}
    _train("llava", _recipe(tmp_path / "two", module=module, **init))
    config = load_pruning_module(tmp_path / "two").config
    assert (config.spread_share, config.spread_by) == (0.3, "diverse")
    assert (config.width, config.num_blocks) == (64, 1)
    # What is not said stays.
    _train("llava", _recipe(tmp_path / "three", init=str(tmp_path / "two")))
    assert load_pruning_module(tmp_path / "three").config.spread_share == 0.3
    with pytest.raises(ValueError, match=r"module\.num_blocks=2, but .*one, has 1"):
        _train("llava", _recipe(tmp_path / "four", module={"num_blocks": 2}, **init))

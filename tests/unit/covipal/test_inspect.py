"""`vllm-covipal inspect`: kept patches keep their brightness, the others are dimmed."""

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageFont

import tiny_lvlm
from vllm_covipal import hf
from vllm_covipal.commands import inspect, kept_sheet
from vllm_covipal.commands.inspect_picture import (
    DIMMED,
    SIDE,
    View,
    _shortened,
    light,
    panel_corner,
)
from vllm_covipal.core.fingerprint import fingerprint
from vllm_covipal.core.pruner import PruningModule, PruningModuleConfig
from vllm_covipal.core.pruner_files import save_pruning_module
from vllm_covipal.selectors import build_selector
from vllm_covipal.training.encode import chat_prompt

QUESTION = "what is the color of the red circle ?"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny LLaVA, a pruning module for it, a picture."""
    root = tmp_path_factory.mktemp("inspect")
    model, processor = tiny_lvlm.llava()
    model.save_pretrained(root / "model")
    processor.save_pretrained(root / "model")
    torch.manual_seed(0)
    config = PruningModuleConfig.for_hidden_size(
        tiny_lvlm.WIDTH, fingerprint=fingerprint(model.config), trained_for="tiny"
    )
    save_pruning_module(PruningModule(config), root / "ppm")
    tiny_lvlm.picture(80, 48).save(root / "picture.png")
    return root


def _run(folder: Path, *words: str, out: str = "kept.png") -> int:
    parser = argparse.ArgumentParser()
    inspect.add_arguments(parser)
    required = ["--question", QUESTION, "--model", str(folder / "model")]
    arguments = [str(folder / "picture.png"), *required, "--out", str(folder / out), *words]
    return inspect.run(parser.parse_args(arguments))


def _pixels(picture: Image.Image) -> Any:
    return np.asarray(picture.convert("RGB")).astype(float)


def test_lit_patches_are_bright_and_others_dim() -> None:
    """Patch by patch over a plain picture, two views numbered through."""
    views = [View(Image.new("RGB", (50, 50), (200, 100, 50)), grid) for grid in ((4, 4), (2, 3))]
    pixels = _pixels(light(views, {0, 5, 16, 21}))
    assert pixels.shape == (SIDE, SIDE + 8 + SIDE, 3)
    for number in range(22):
        grid, place = ((4, 4), number) if number < 16 else ((2, 3), number - 16)
        patch, left = (SIDE // 4, 0) if number < 16 else (SIDE // 3, SIDE + 8)
        top, start = place // grid[1] * patch, left + place % grid[1] * patch
        shade = 1 if number in (0, 5, 16, 21) else DIMMED
        seen = pixels[top : top + patch, start : start + patch]
        assert np.abs(seen - np.array([200, 100, 50]) * shade).max() <= 1


def test_a_long_question_stays_on_the_sheet() -> None:
    """It is cut at the edge, never wider than the pictures, and line breaks are spaces."""
    font = ImageFont.load_default(14)
    assert _shortened("what\n is  it ?", 300, font) == "what is it ?"
    cut = _shortened("what is it ? " * 50, 300, font)
    assert cut.startswith("what is it ? what") and cut.endswith("...")
    assert font.getlength(cut) <= 300
    assert _shortened("what", 0, font) == "..."


def test_the_sheet_shows_what_each_selector_keeps(folder: Path) -> None:
    """Against the transformers twin: one line a ratio, one panel a selector, all tokens first."""
    words = ["--selector", "grid", "cdpruner", "ppm", "--ppm", str(folder / "ppm")]
    assert _run(folder, *words, "--keep-ratio", "0.5", "0.2") == 0
    sheet = _pixels(Image.open(folder / "kept.png"))
    model, processor = tiny_lvlm.llava()
    prompt = chat_prompt(processor, QUESTION, 1)
    image = tiny_lvlm.picture(80, 48)
    encoded = hf.encode_prompt(model, processor, prompt, images=[image])
    module = inspect._load_ppm(str(folder / "ppm"), model, "tiny")
    patch = SIDE // 4

    def panel(row: int, column: int) -> Any:
        left, top = panel_corner(row, column, (SIDE, SIDE))
        return sheet[top : top + SIDE, left : left + SIDE]

    for row, keep_ratio in enumerate((0.5, 0.2)):
        whole = panel(row, 0)
        assert whole.min() >= 40  # the picture has nothing dark
        for column, name in enumerate(("grid", "cdpruner", "ppm"), start=1):
            items = hf.visual_items(model, encoded, keep_ratio)
            kept = build_selector(name, pruning_module=module).select(items)[0].tolist()
            for place in range(16):
                top, left = place // 4 * patch, place % 4 * patch
                of_patch = (slice(top, top + patch), slice(left, left + patch))
                shade = 1 if place in kept else DIMMED
                assert np.abs(panel(row, column)[of_patch] - whole[of_patch] * shade).max() <= 1


def test_the_crop_is_what_the_tower_sees(folder: Path) -> None:
    """LLaVA's processor cuts the margins off: the first panel shows the middle square."""
    model, processor = tiny_lvlm.llava()
    image = tiny_lvlm.picture(80, 48)
    encoded = hf.encode_prompt(
        model, processor, chat_prompt(processor, QUESTION, 1), images=[image]
    )
    (view,) = kept_sheet._views(image, encoded, processor.image_processor)
    # Bicubic to 53 x 32, the middle 32 x 32 of it.
    expected = image.resize((53, 32), Image.Resampling.BICUBIC).crop((10, 0, 42, 32))
    assert view.picture.size == (32, 32)
    assert np.abs(_pixels(view.picture) - _pixels(expected)).mean() < 6


@pytest.mark.parametrize("family", tiny_lvlm.FAMILIES)
def test_every_family_has_views(family: str) -> None:
    """One picture a grid, whatever the packing."""
    model, processor = tiny_lvlm.FAMILIES[family]()
    image = tiny_lvlm.picture(80, 48)
    encoded = hf.encode_prompt(
        model, processor, chat_prompt(processor, QUESTION, 1), images=[image]
    )
    views = kept_sheet._views(image, encoded, processor.image_processor)
    assert [view.grid for view in views] == list(encoded.items[0].grids)
    if family.startswith("qwen"):
        assert views[0].picture is image


def test_all_training_free_selectors_are_the_default(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without --ppm no pruning module is asked for; one line says what was written."""
    assert _run(folder) == 0
    assert capsys.readouterr().out.endswith("kept.png: random, grid, divprune, cdpruner at 0.25\n")


def test_without_a_template_the_placeholder_comes_first() -> None:
    """A processor that has no chat template."""
    _, processor = tiny_lvlm.llava()
    processor.chat_template = None
    assert chat_prompt(processor, "what ?", 1) == "<image>\nwhat ?"


def test_what_is_wrong_is_said_in_one_line(folder: Path, tmp_path: Path) -> None:
    """Unreadable picture, missing module, module of another model, no picture file, no model."""
    (tmp_path / "text.png").write_text("no picture")
    other = PruningModuleConfig.for_hidden_size(64, fingerprint="f" * 16, trained_for="other")
    save_pruning_module(PruningModule(other), tmp_path / "ppm")
    with pytest.raises(ValueError, match="selector 'ppm' needs --ppm"):
        _run(folder, "--selector", "ppm")
    with pytest.raises(ValueError, match="trained for other"):
        _run(folder, "--ppm", str(tmp_path / "ppm"))
    with pytest.raises(ValueError, match="--out must be a picture file such as kept.png"):
        _run(folder, out="kept.doc")
    with pytest.raises(ValueError, match="--out: no folder"):
        _run(folder, out="missing/kept.png")
    with pytest.raises(ValueError, match=r"keep_ratio must be in \(0, 1\], got 1.5"):
        _run(folder, "--keep-ratio", "1.5")
    (folder / "picture.png").rename(folder / "moved.png")
    try:
        with pytest.raises(ValueError, match=r"cannot read the image .*picture\.png"):
            _run(folder)
    finally:
        (folder / "moved.png").rename(folder / "picture.png")
    for model in ("/nowhere", str(Path(__file__).parents[3] / "models" / "needle")):  # no eyes
        with pytest.raises(ValueError, match=f"model={model}: transformers cannot load") as said:
            _run(folder, "--model", model)
        assert "\n" not in str(said.value)

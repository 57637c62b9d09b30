"""What the user may set, and what they are told when they set it wrong."""

from pathlib import Path

import pytest
import yaml

from vllm_covipal.config import CovipalConfig, load_config, parse_keep_ratio
from vllm_spindle.config import load_config as load_spindle_config

CONFIGS = Path(__file__).parents[3] / "configs"
# train_*.yaml are recipes of `vllm-covipal train`, not options of a server.
SHIPPED = sorted(
    path for path in (CONFIGS / "covipal").glob("*.yaml") if not path.name.startswith("train_")
)
BOTH = sorted((CONFIGS / "both").glob("*.yaml"))


def test_defaults_prune_only_what_asks_for_it() -> None:
    """A selector alone keeps every token of a request that names no ratio."""
    assert load_config({"selector": "grid"}).keep_ratio == 1.0


def test_a_dict_sets_every_field() -> None:
    """Every dial arrives where it is named."""
    options = {
        "keep_ratio": 0.25,
        "selector": "ppm",
        "ppm": "folder",
        "max_text_tokens": 64,
        "turn_end": ["ASSISTANT:"],
        "reuse_mib": 0,
        "seed": 3,
    }
    assert set(options) == set(CovipalConfig.model_fields)
    assert load_config(options).model_dump() == options | {"turn_end": ("ASSISTANT:",)}


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ({}, ["selector 'ppm' needs", "divprune"]),
        ({"selector": "grid", "ppm": "folder"}, ["'ppm' is given", "selector='grid'"]),
        ({"selector": "gird"}, ["selector='gird'", "'grid'"]),
        ({"selector": "grid", "keep_ration": 0.5}, ["'keep_ration'", "did you mean 'keep_ratio'?"]),
        ({"selector": "grid", "keep_ratio": 0}, ["keep_ratio=0", "greater than 0"]),
        ({"selector": "grid", "keep_ratio": "0.5"}, ["keep_ratio='0.5'"]),
        ({"selector": "grid", "reuse_mib": -1}, ["reuse_mib=-1"]),
        ("no/such/file.yaml", ["no/such/file.yaml", "cannot read"]),
        ([0.25], ["expected a mapping", "[0.25]"]),
    ],
)
def test_what_is_wrong_is_named(options: object, parts: list[str]) -> None:
    """One line: the key or field, its value, what is allowed."""
    with pytest.raises(ValueError) as refusal:
        load_config(options)
    message = str(refusal.value)
    assert all(part in message for part in parts) and "\n" not in message


def test_a_file_that_is_no_text_is_named(tmp_path: Path) -> None:
    """A path that leads to weights, say."""
    path = tmp_path / "covipal.yaml"
    path.write_bytes(b"selector: \xff\n")
    with pytest.raises(ValueError, match=rf"{path}: not valid YAML"):
        load_config(str(path))


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_a_shipped_file_is_what_its_name_says(path: Path) -> None:
    """Selector and share are in the name, and the header says how to serve it."""
    selector, percent = path.stem.split("_")
    config = load_config(path)
    assert (config.selector, config.keep_ratio) == (selector, int(percent) / 100)
    assert f'{{"covipal": "configs/covipal/{path.name}"}}' in path.read_text(encoding="utf-8")


@pytest.mark.parametrize("path", BOTH, ids=lambda path: path.stem)
def test_a_file_for_both_plugins_is_valid_for_each(path: Path) -> None:
    """As vLLM's own ``--config`` reads it; names and shares are in the file's name."""
    selector, visual_percent, method, percent = path.stem.split("_")
    text = path.read_text(encoding="utf-8")
    sections = yaml.safe_load(text)["additional-config"]
    covipal, spindle = load_config(sections["covipal"]), load_spindle_config(sections["spindle"])
    assert (covipal.selector, covipal.keep_ratio) == (selector, int(visual_percent) / 100)
    assert (spindle.method, spindle.keep_ratio) == (method, int(percent) / 100)
    assert f"vllm serve MODEL --config configs/both/{path.name}" in text


def test_something_is_shipped() -> None:
    """The parametrised tests above had files to look at."""
    assert len(SHIPPED) >= 6 and BOTH


@pytest.mark.parametrize("value", [0, -0.5, 1.5, float("nan"), "0.5", True, None])
def test_a_requests_keep_ratio_out_of_range_is_refused(value: object) -> None:
    """The message names the value."""
    with pytest.raises(ValueError, match="covipal_keep_ratio must be") as refusal:
        parse_keep_ratio(value)
    assert str(value) in str(refusal.value)


@pytest.mark.parametrize("value", [0.25, 1, 1.0, 1e-05])
def test_a_requests_keep_ratio_is_a_number_in_range(value: float) -> None:
    """Numbers in (0, 1] are taken as they are."""
    assert parse_keep_ratio(value) == value

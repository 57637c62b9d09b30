"""What the user may set, and what they are told when they set it wrong."""

from pathlib import Path

import pytest
from pydantic import ValidationError

from vllm_spindle.commands.geometry import read_geometry
from vllm_spindle.commands.plan import make_report
from vllm_spindle.config import SpindleConfig, load_config, parse_keep_ratio, with_profile
from vllm_spindle.policy import SpindlePolicy

ROOT = Path(__file__).parents[3]
SHIPPED = sorted((ROOT / "configs" / "spindle").glob("*.yaml"))


def test_default_is_off() -> None:
    """Asked for with no options, everything is kept."""
    assert load_config({}) == SpindleConfig()
    assert not SpindleConfig().is_on
    assert SpindleConfig(keep_ratio=0.99).is_on


def test_fields_cannot_be_changed() -> None:
    """A configuration is frozen, so both sides of the engine see the same one."""
    with pytest.raises(ValidationError, match="frozen"):
        SpindleConfig().keep_ratio = 0.5


def test_a_dict_sets_every_field() -> None:
    """Every dial arrives where it is named."""
    options = {
        "keep_ratio": 0.25,
        "method": "both",
        "band_methods": ("merge", "both", "evict", "evict", "evict", "evict"),
        "merge_factor": 3.0,
        "key_share": 0.25,
        "theta_key": 0.9,
        "theta_value": 0.8,
        "window": 16,
        "recent": 4,
        "observers": 64,
        "score": "paper",
        "last_query": False,
        "reduce_after": 8,
        "pool_kernel": 7,
        "gqa": "mean",
        "budget": "pyramid",
        "head_shares": None,  # with a budget that is not measured
        "beta": 0.1,
        "num_bands": 6,
        "min_prompt_len": 64,
        "reduce_share": 0.5,
        "deep_visual_share": 0.5,
        "protected_prefix_tokens": 1000,
        "seed": 3,
    }
    assert set(options) == set(SpindleConfig.model_fields)
    assert load_config(options).model_dump() == options


def test_band_methods_come_as_a_list() -> None:
    """JSON and YAML have no tuples."""
    config = load_config({"band_methods": ["merge", "evict"]})
    assert config.band_methods == ("merge", "evict")
    assert config.merges


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ({"method": "merge", "gqa": "unfold"}, ["gqa='unfold'", "'union' or 'mean'"]),
        ({"band_methods": ["both"], "num_bands": 3}, ["names 1 bands", "num_bands=3"]),
        ({"band_methods": ["melt"]}, ["band_methods.0='melt'", "'evict', 'merge' or 'both'"]),
    ],
)
def test_methods_that_do_not_go_together_are_refused(
    options: dict[str, object], parts: list[str]
) -> None:
    """The message names what clashes and what to use."""
    with pytest.raises(ValueError) as refusal:
        load_config(options)
    assert all(part in str(refusal.value) for part in parts)


def test_a_configuration_passes_through() -> None:
    """A configuration that is already one is returned as it is."""
    config = SpindleConfig(keep_ratio=0.5)
    assert load_config(config) is config


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ({"keep_ratio": 1.5}, ["keep_ratio=1.5", "less than or equal to 1"]),
        ({"keep_ratio": 0}, ["keep_ratio=0", "greater than 0"]),
        ({"keep_ratio": float("nan")}, ["keep_ratio=nan", "1"]),
        ({"window": 0}, ["window=0", "greater than or equal to 1"]),
        ({"window": 1025}, ["window=1025", "less than or equal to 1024"]),
        ({"window": "many"}, ["window='many'", "integer"]),
        ({"pool_kernel": 4}, ["pool_kernel=4", "must be odd"]),
        ({"pool_kernel": 65}, ["pool_kernel=65", "less than or equal to 63"]),
        ({"score": "best"}, ["score='best'", "'pooled'", "'paper'", "'random'"]),
        ({"gqa": "max"}, ["gqa='max'", "'union'", "'mean'", "'unfold'"]),
        ({"budget": "flat"}, ["budget='flat'", "'pyramid'", "'uniform'"]),
        ({"beta": 1}, ["beta=1", "less than 1"]),
        ({"beta": -0.1}, ["beta=-0.1", "greater than or equal to 0"]),
        ({"num_bands": 0}, ["num_bands=0", "greater than or equal to 1"]),
        ({"num_bands": 65}, ["num_bands=65", "less than or equal to 64"]),
        ({"min_prompt_len": -1}, ["min_prompt_len=-1", "greater than or equal to 0"]),
        ({"band_methods": []}, ["band_methods=[]", "at least 1 item"]),
        ({"head_shares": 0.5}, ["head_shares=0.5", "path of a profile"]),
        ({"head_shares": {0.5: 0.5}}, ["head_shares={0.5: 0.5}", "path of a profile"]),
        ({"head_shares": {0.5: [[None]]}}, ["head_shares=", "path of a profile"]),
        ({"head_shares": {"nan": [[0.5]]}}, ["head_shares=", "point nan", "a mean of 0.5"]),
        ({"keepratio": 0.5}, ["'keepratio'", "did you mean 'keep_ratio'?"]),
        ({"pool_kernal": 5}, ["'pool_kernal'", "did you mean 'pool_kernel'?"]),
        ({"zzz": 1}, ["'zzz'", "valid keys: keep_ratio, method, band_methods"]),
        ({"window": 0, "beta": 1}, ["window=0", "beta=1"]),
    ],
    ids=str,
)
def test_a_refusal_says_what_and_why(options: dict[str, object], parts: list[str]) -> None:
    """An error names the field, its value and what is allowed; a typo, the nearest key."""
    with pytest.raises(ValueError, match="^spindle: ") as refusal:
        load_config(options)
    message = str(refusal.value)
    assert [part for part in parts if part not in message] == []
    assert "\n" not in message


@pytest.mark.parametrize("value", [None, 0.25, ["keep_ratio"]])
def test_a_value_of_the_wrong_kind_is_refused_with_an_example(value: object) -> None:
    """Neither a mapping nor a path: the error shows the value and what to write instead."""
    with pytest.raises(ValueError, match="expected a mapping") as refusal:
        load_config(value)
    assert repr(value) in str(refusal.value)
    assert '{"spindle": {"keep_ratio": 0.25}}' in str(refusal.value)


@pytest.mark.parametrize("as_type", [str, Path])
def test_a_yaml_file_loads(tmp_path: Path, as_type: type) -> None:
    """A path stands for the mapping in its file."""
    path = tmp_path / "quarter.yaml"
    path.write_text("# a comment\nkeep_ratio: 0.25\ngqa: mean\n", encoding="utf-8")
    assert load_config(as_type(path)) == SpindleConfig(keep_ratio=0.25, gqa="mean")


@pytest.mark.parametrize(
    ("text", "part"),
    [("keep_ratio: 2", "keep_ratio=2"), ("keep: [", "not valid YAML"), ("", "expected a mapping")],
)
def test_a_bad_yaml_file_is_named(tmp_path: Path, text: str, part: str) -> None:
    """What is wrong in a file is reported with the file's path."""
    path = tmp_path / "bad.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=part) as refusal:
        load_config(str(path))
    assert str(refusal.value).startswith(f"{path}: ")


def test_a_missing_file_is_named() -> None:
    """A path that cannot be read is reported with the path and the reason."""
    with pytest.raises(ValueError, match=r"nowhere\.yaml \(No such file or directory\)"):
        load_config("nowhere.yaml")


@pytest.mark.skipif(not SHIPPED, reason="no configurations shipped yet")
def test_every_shipped_configuration_loads() -> None:
    """Every YAML in configs/spindle is valid and switches eviction on."""
    assert [path.name for path in SHIPPED if not load_config(path).is_on] == []


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_a_shipped_file_is_what_its_name_says(path: Path) -> None:
    """Method and share are in the name, and the header says how to serve it."""
    method, percent = path.stem.split("_")
    config = load_config(path)
    assert (config.method, config.keep_ratio) == (method, int(percent) / 100)
    assert f"configs/spindle/{path.name}" in path.read_text(encoding="utf-8")


@pytest.mark.parametrize("value", [0.25, 1, 1.0, 1e-05])
def test_a_requests_keep_ratio_is_a_number_in_range(value: float) -> None:
    """Numbers in (0, 1] are taken as they are."""
    assert parse_keep_ratio(value) == value


@pytest.mark.parametrize("value", [0, -0.5, 1.01, float("nan"), float("inf"), True, "0.5", None])
def test_a_requests_bad_keep_ratio_is_refused(value: object) -> None:
    """Everything else is refused with the key, the range and the value."""
    with pytest.raises(ValueError, match=r"spindle_keep_ratio must be .*\(0, 1\], got") as refusal:
        parse_keep_ratio(value)
    assert str(value) in str(refusal.value)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
@pytest.mark.parametrize("model", ["needle", "recall"])
def test_a_preset_holds_no_more_than_its_name_says(path: Path, model: str) -> None:
    """True bytes over the true GQA cache's: padding, entries, indexes, norms, positions counted."""
    folder = str(ROOT / "models" / model)
    config, shape = with_profile(load_config(path), folder), read_geometry(folder)
    assert config.keep_ratio == int(path.stem.rpartition("_")[2]) / 100
    policy = SpindlePolicy(config, shape.num_layers, 32, shape.num_queries_per_kv)
    for prompt_len in (384, 1000, 1500):
        report = make_report(policy, shape, prompt_len)
        assert report["is_reduced"]
        assert report["true_ratio"] <= config.keep_ratio

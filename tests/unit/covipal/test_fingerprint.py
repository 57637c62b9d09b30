"""The fingerprint follows the embedding space and nothing else."""

import pytest
from transformers import (
    AutoConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaNextConfig,
    PreTrainedConfig,
    Qwen2_5_VLConfig,
    Qwen2VLConfig,
)

from vllm_covipal.core.fingerprint import fingerprint

FAMILIES = [LlavaConfig, LlavaNextConfig, Qwen2VLConfig, Qwen2_5_VLConfig]


@pytest.mark.parametrize("family", FAMILIES)
def test_it_survives_the_disk(family: type[PreTrainedConfig], tmp_path: object) -> None:
    """A configuration made here and one loaded by AutoConfig agree, as object and as dict."""
    config = family()
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    expected = fingerprint(config)
    assert len(expected) == 16
    assert {fingerprint(loaded), fingerprint(loaded.to_dict())} == {expected}


def test_families_differ() -> None:
    """No two families share one."""
    assert len({fingerprint(family()) for family in FAMILIES}) == len(FAMILIES)


@pytest.mark.parametrize(
    "changes",
    [
        {"dtype": "bfloat16"},
        {"_name_or_path": "/elsewhere"},
        {"transformers_version": "9.9"},
        {"architectures": ["X"]},
        {"rope_scaling": {"factor": 2}},
    ],
)
def test_what_leaves_the_space_alone_leaves_the_fingerprint(changes: dict[str, object]) -> None:
    """Type, path and version are of no account."""
    config = LlavaConfig().to_dict()
    assert fingerprint(config | changes) == fingerprint(config)


@pytest.mark.parametrize(
    ("section", "changes"),
    [
        ("text_config", {"hidden_size": 1024}),
        ("text_config", {"num_hidden_layers": 3}),
        ("text_config", {"vocab_size": 99}),
        ("vision_config", {"hidden_size": 64}),
        ("vision_config", {"num_hidden_layers": 3}),
        ("vision_config", {"patch_size": 7}),
        ("vision_config", {"image_size": 448}),
    ],
)
def test_what_changes_the_space_changes_the_fingerprint(
    section: str, changes: dict[str, int]
) -> None:
    """Each part of the geometry counts."""
    config = LlavaConfig().to_dict()
    assert fingerprint(config | {section: config[section] | changes}) != fingerprint(config)


def test_the_projected_layer_counts() -> None:
    """Another layer of the tower is another space."""
    config = LlavaConfig().to_dict()
    assert fingerprint(config | {"vision_feature_layer": -1}) != fingerprint(config)


def test_a_text_model_is_refused() -> None:
    """It has no visual tokens to score."""
    with pytest.raises(ValueError, match="'llama' is no vision-language configuration"):
        fingerprint(LlamaConfig())

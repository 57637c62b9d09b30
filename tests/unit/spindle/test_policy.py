"""Configuration plus geometry: bands and plans."""

import pickle
from fractions import Fraction

import pytest

from vllm_spindle.config import SpindleConfig
from vllm_spindle.core.bands import split_layers
from vllm_spindle.core.budget import plan_prompt
from vllm_spindle.policy import SpindlePolicy


def _policy(num_layers: int = 32, block_size: int = 16, **options: object) -> SpindlePolicy:
    return SpindlePolicy(
        config=SpindleConfig(**options),
        num_layers=num_layers,
        block_size=block_size,
        num_queries_per_kv=4,
    )


@pytest.mark.parametrize("percent", range(1, 101))
def test_a_percent_of_a_hundred_tokens_is_that_many(percent: int) -> None:
    """0.29 of 100 tokens is 29, not the 28 of binary floats; so for every percent."""
    policy = _policy(num_layers=1, block_size=1, recent=1, min_prompt_len=0)
    (plan,) = policy.plan(100, percent / 100)
    assert plan.held_blocks == percent


def test_the_plan_is_the_cores_with_the_configured_dials() -> None:
    """Every dial that bears on counts reaches plan_prompt."""
    options = {"recent": 48, "beta": 0.2, "budget": "pyramid", "min_prompt_len": 200}
    policy = _policy(keep_ratio=0.3, num_bands=8, **options)
    for prompt_len in (150, 250, 999):
        expected = plan_prompt(
            prompt_len,
            keep_ratio=Fraction(3, 10),
            recent=48,
            window=32,
            observers=256,
            block_size=16,
            bands=split_layers(32, 8),
            beta=Fraction(1, 5),
            shape="pyramid",
            min_prompt_len=200,
        )
        assert policy.plan(prompt_len) == expected


def test_beta_shapes_the_pyramid() -> None:
    """A higher floor leaves the deepest band more of the same total."""
    steep = _policy(keep_ratio=0.3, budget="pyramid", beta=0.0).plan(4000)
    shallow = _policy(keep_ratio=0.3, budget="pyramid", beta=0.25).plan(4000)
    assert steep[-1].held_blocks < shallow[-1].held_blocks
    assert sum(p.held_blocks for p in steep) == sum(p.held_blocks for p in shallow)


def test_a_request_overrides_the_configured_ratio() -> None:
    """A request's own ratio gives the plan of an engine configured with it."""
    asked, configured = _policy(keep_ratio=0.5), _policy(keep_ratio=0.2)
    assert asked.plan(1000, 0.2) == configured.plan(1000)
    assert asked.plan(1000, 0.2) != asked.plan(1000)
    assert not any(p.is_reduced for p in asked.plan(1000, 1.0))


def test_off_keeps_every_block() -> None:
    """The default configuration moves nothing, however long the prompt."""
    for plan in _policy().plan(100_000):
        assert not plan.is_reduced
        assert plan.held_blocks == 6250


def test_unfold_pays_for_its_copies() -> None:
    """Only with unfold are the regions multiples of the group's query heads."""
    unfold = [p.reduced_blocks for p in _policy(keep_ratio=0.3, gqa="unfold").plan(4000)]
    union = [p.reduced_blocks for p in _policy(keep_ratio=0.3, gqa="union").plan(4000)]
    assert [blocks % 4 for blocks in unfold] == [0, 0, 0, 0]
    assert [blocks % 4 for blocks in union] != [0, 0, 0, 0]
    assert sum(union) - 4 < sum(unfold) <= sum(union)


@pytest.mark.parametrize(("num_layers", "num_bands"), [(32, None), (13, None), (13, 3), (6, 6)])
def test_every_layer_is_in_the_band_that_lists_it(num_layers: int, num_bands: int | None) -> None:
    """band_of_layer inverts bands, and the bands cover the layers in order."""
    policy = _policy(num_layers=num_layers, num_bands=num_bands)
    assert [layer for band in policy.bands for layer in band] == list(range(num_layers))
    for index, band in enumerate(policy.bands):
        assert {policy.band_of_layer(layer_idx) for layer_idx in band} == {index}
    assert len(policy.bands) == (num_bands or 4)


def test_more_bands_than_layers_is_refused() -> None:
    """The refusal names the field, its value, the layers and what to do."""
    with pytest.raises(ValueError, match=r"num_bands=8: .* only 6 layers; .* at most 6"):
        _policy(num_layers=6, num_bands=8)


def test_a_policy_survives_the_process_boundary() -> None:
    """Pickled and back it is equal, hashes alike and plans alike."""
    policy = _policy(keep_ratio=0.37)
    copy = pickle.loads(pickle.dumps(policy))
    assert copy == policy
    assert hash(copy) == hash(policy)
    assert copy.plan(777) == policy.plan(777)


def test_policies_that_differ_do_not_share_plans() -> None:
    """The cache of plans keeps two configurations apart."""
    first, second = _policy(keep_ratio=0.3, recent=16), _policy(keep_ratio=0.3, recent=64)
    assert first != second
    assert first.plan(500)[0].tail_block == (500 - 16) // 16
    assert second.plan(500)[0].tail_block == (500 - 64) // 16


def test_bands_too_uneven_for_one_group_each_are_refused() -> None:
    """Bands that vLLM would cut into several groups are refused, with the counts that work."""
    with pytest.raises(ValueError, match=r"num_bands=4: 6 layers .* 2 and 1.* one of 1, 2, 3, 6$"):
        _policy(num_layers=6, num_bands=4)

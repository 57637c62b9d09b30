"""Measured budgets: a profile's arithmetic, its file, and how a configuration comes by it."""

import json
import pickle
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest

import tiny
from vllm_spindle.config import PROFILE_FILE, SpindleConfig, load_config, with_profile
from vllm_spindle.core.budget import BandPlan
from vllm_spindle.core.profile import (
    HeadShares,
    Profile,
    head_blocks,
    make_profile,
    mean_share,
    shares_at,
)
from vllm_spindle.engine.step import HeadRows
from vllm_spindle.policy import SpindlePolicy

HALF = {"0.5": [[0.9, 0.7], [0.3, 0.1]]}
SHARES = tiny.head_shares(num_layers=6, num_heads=2)


def test_between_points_shares_are_on_a_line() -> None:
    """Half-way from the measured point to everything, each head is half-way, too."""
    profile = make_profile({0.5: [[0.9, 0.7], [0.3, 0.1]]})
    assert [mean_share(point) for point in profile] == [1, Fraction(1, 2), 0]
    assert shares_at(profile, Fraction(3, 4)) == (
        (Fraction(19, 20), Fraction(17, 20)),
        (Fraction(13, 20), Fraction(11, 20)),
    )
    assert shares_at(profile, Fraction(1, 4))[1] == (Fraction(3, 20), Fraction(1, 20))
    assert shares_at(profile, Fraction(0)) == ((0, 0), (0, 0))
    with pytest.raises(ValueError, match="mean share must be in"):
        shares_at(profile, Fraction(3, 2))


def test_blocks_are_shared_by_proportion_none_above_the_context() -> None:
    """What one head cannot hold goes to the others; as long as there are blocks each has one."""
    shares = [Fraction(9, 10), Fraction(1, 10), Fraction(0)]
    assert head_blocks(shares, 10, 20) == (8, 1, 1)
    assert head_blocks(shares, 24, 10) == (10, 10, 4)
    assert head_blocks(shares, 2, 10) == (2, 0, 0)
    assert head_blocks(shares, 0, 10) == (0, 0, 0)


@pytest.mark.parametrize(
    ("points", "message"),
    [
        ({}, "no point"),
        ({0.5: [[0.5, 0.5], [0.5]]}, "one share for each kv head"),
        ({0.5: [[]]}, "one share for each kv head"),
        ({0.5: [[0.5]], 0.4: [[0.4, 0.4]]}, "one share for each kv head"),
        ({0.5: [[1.2, -0.2]]}, r"shares must be in \[0, 1\]"),
        ({0.3: [[0.9, 0.1]]}, "have a mean of 0.5"),
    ],
)
def test_what_is_no_profile_is_refused(points: Any, message: str) -> None:
    """By what is wrong with it."""
    with pytest.raises(ValueError, match=message):
        make_profile(points)


def test_auto_takes_the_profile_beside_the_model(tmp_path: Path) -> None:
    """With it budgets are measured, in its bands; without it uniform, and so where they cannot."""
    config = SpindleConfig(keep_ratio=0.25)
    assert with_profile(config, str(tmp_path)).budget == "uniform"
    text = json.dumps({"num_bands": 2, "head_shares": HALF})
    (tmp_path / PROFILE_FILE).write_text(text)
    found = with_profile(config, str(tmp_path))
    assert (found.budget, found.num_bands) == ("measured", 2)
    assert found.head_shares == ((0.5, ((0.9, 0.7), (0.3, 0.1))),)
    assert with_profile(config.model_copy(update={"num_bands": 1}), str(tmp_path)).num_bands == 1
    assert hash(found) == hash(load_config(found.model_dump()))
    for dials in ({"method": "both"}, {"gqa": "unfold"}, {"budget": "uniform"}):
        other = with_profile(load_config({"keep_ratio": 0.25, **dials}), str(tmp_path))
        assert (other.budget, other.head_shares, other.num_bands) == ("uniform", None, None)


def test_a_profile_by_its_path(tmp_path: Path) -> None:
    """Under ``head_shares``, wherever it lies."""
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({"head_shares": HALF}))
    config = load_config({"keep_ratio": 0.25, "head_shares": str(path)})
    assert with_profile(config, "no/model").budget == "measured"


def test_what_cannot_be_measured_is_refused(tmp_path: Path) -> None:
    """No profile, a broken one, one of another shape, and what kv heads that differ rule out."""
    measured = SpindleConfig(keep_ratio=0.25, budget="measured")
    with pytest.raises(ValueError, match="no spindle-profile.json in .*vllm-spindle profile"):
        with_profile(measured, str(tmp_path))
    (tmp_path / PROFILE_FILE).write_text('{"head_shares": {"0.5": [[2]]}}')
    with pytest.raises(ValueError, match="is no profile .*vllm-spindle profile"):
        with_profile(measured, str(tmp_path))
    with pytest.raises(ValueError, match="cannot read the profile nowhere.json"):
        load_config({"head_shares": "nowhere.json"})
    with pytest.raises(ValueError, match="methods that merge.*uniform"):
        load_config({"budget": "measured", "head_shares": HALF, "method": "merge"})
    with pytest.raises(ValueError, match="gqa='unfold'"):
        load_config({"budget": "measured", "head_shares": HALF, "gqa": "unfold"})
    with pytest.raises(ValueError, match="head_shares is what budget='measured' is made of"):
        load_config({"budget": "pyramid", "head_shares": HALF})
    config = load_config({"budget": "measured", "head_shares": HALF})
    with pytest.raises(ValueError, match="model of 2 layers, this one has 6"):
        SpindlePolicy(config, 6, 32, 4)


@pytest.mark.parametrize("num_bands", [2, 3, 6])
@pytest.mark.parametrize("prompt_len", [200, 1024, 1500])
def test_heads_together_hold_the_region(prompt_len: int, num_bands: int) -> None:
    """In every layer, for all heads and for a rank's; in all bands the bytes that uniform holds."""
    dials = {"keep_ratio": 0.25, "num_bands": num_bands}
    policy = SpindlePolicy(
        load_config({**dials, "budget": "measured", "head_shares": SHARES}), 6, 32, 4
    )
    plans = policy.plan(prompt_len)
    for band, plan in enumerate(plans):
        for layer_idx in policy.bands[band]:
            for heads in (range(2), range(1), range(1, 2)):
                blocks = policy.head_blocks(layer_idx, plan, heads)
                assert sum(blocks) == plan.reduced_blocks * len(heads)
                assert all(0 <= count <= plan.context_blocks for count in blocks)
    uniform = SpindlePolicy(load_config({**dials, "budget": "uniform"}), 6, 32, 4)
    assert sum(plan.held_blocks for plan in plans) == sum(
        plan.held_blocks for plan in uniform.plan(prompt_len)
    )
    if num_bands == 6 and prompt_len > 1000:
        assert len({plan.held_blocks for plan in plans}) > 1


def test_a_profile_is_read_once_for_all_layers_of_a_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    """Between two points all heads are interpolated: once, not once for each layer."""
    dials = {"keep_ratio": 0.31, "budget": "measured", "head_shares": SHARES}
    policy = SpindlePolicy(load_config(dials), 6, 32, 4)
    plan = policy.plan(1331)[0]
    asked = []

    def counting(profile: Profile, mean: Fraction) -> HeadShares:
        asked.append(mean)
        return shares_at(profile, mean)

    monkeypatch.setattr("vllm_spindle.policy.shares_at", counting)
    for layer_idx in policy.bands[0]:
        for heads in (range(2), range(1)):
            policy.head_blocks(layer_idx, plan, heads)
    assert asked == [plan.context_share]


def test_a_plan_is_looked_up_without_its_profile(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every running request's, in every step: thousands of numbers are not hashed for each."""
    dials = {"keep_ratio": 0.32, "budget": "measured", "head_shares": SHARES}
    policy = SpindlePolicy(load_config(dials), 6, 32, 4)
    hashed = []
    stock = SpindleConfig.__hash__

    def counting(config: SpindleConfig) -> int:
        hashed.append(config)
        return stock(config)

    monkeypatch.setattr(SpindleConfig, "__hash__", counting)
    for prompt_len in (900, 900, 1000):
        policy.shareable(prompt_len)
        policy.head_blocks(0, policy.plan(prompt_len)[0], range(2))
    assert len(hashed) == 1
    copied = pickle.loads(pickle.dumps(policy))
    assert copied == policy
    assert hash(copied) == hash(policy)
    # Not sent: another process has other hashes of strings.
    assert len(hashed) == 2


def test_rows_of_one_plan_share_its_counts() -> None:
    """A batch of like prompts asks for the pages of its heads once."""
    plan, other = (BandPlan(first_block=first, tail_block=8, prompt_blocks=9) for first in (4, 6))
    asked = []

    def head_blocks_of(of: BandPlan) -> list[tuple[int, ...]]:
        asked.append(of)
        return [(of.reduced_blocks + 1, of.reduced_blocks - 1)]

    rows = HeadRows.of([plan, None, other, plan], head_blocks_of)
    assert asked == [plan, other]
    assert rows is not None
    assert rows.head_blocks.tolist() == [[[5, 0, 3, 5], [3, 0, 1, 3]]]

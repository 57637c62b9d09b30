"""How much each band keeps: worked examples and brute force."""

import itertools
from fractions import Fraction

import pytest

import oracles
from vllm_spindle.core.bands import split_layers
from vllm_spindle.core.budget import BandPlan, num_blocks, plan_prompt, share_out


def _plan(prompt_len: int, keep_ratio: Fraction, **changes: object) -> tuple[BandPlan, ...]:
    options = {
        "recent": 32,
        "block_size": 16,
        "bands": split_layers(8, 4),
        "beta": Fraction(1, 20),
    } | changes
    return plan_prompt(prompt_len, keep_ratio=keep_ratio, **options)


def test_num_blocks_rounds_up() -> None:
    """A last block in part counts as a block."""
    assert [num_blocks(n, 16) for n in (0, 1, 16, 17, 32)] == [0, 1, 1, 2, 2]


def test_band_plan_counts() -> None:
    """Of blocks 0..9 with the region at 3..7, three are freed, four reduced, seven held."""
    plan = BandPlan(first_block=3, tail_block=7, prompt_blocks=10)
    assert (plan.reduced_blocks, plan.held_blocks, plan.is_reduced) == (4, 7, True)
    assert not BandPlan(first_block=0, tail_block=7, prompt_blocks=10).is_reduced


def test_share_out_gives_the_largest_remainder_first() -> None:
    """2.6 + 2.5 + 0.9 = 6: the units left over go to 0.9 and 2.6."""
    quotas = [Fraction(26, 10), Fraction(25, 10), Fraction(9, 10)]
    assert share_out(quotas, 6, floor=0, cap=9) == [3, 2, 1]


def test_share_out_breaks_ties_for_the_shallower() -> None:
    """Equal remainders: the earlier entry gets the unit, and loses one last."""
    assert share_out([Fraction(3, 2)] * 4, 6, floor=0, cap=9) == [2, 2, 1, 1]
    assert share_out([Fraction(2), Fraction(2), Fraction(0)], 4, floor=1, cap=9) == [2, 1, 1]


def test_share_out_takes_the_floor_from_the_richer() -> None:
    """Quotas 5.8 + 0.1 + 0.1 with at least one each leave four for the first."""
    quotas = [Fraction(58, 10), Fraction(1, 10), Fraction(1, 10)]
    assert share_out(quotas, 6, floor=1, cap=9) == [4, 1, 1]


@pytest.mark.parametrize("total", [2, 13])
def test_share_out_refuses_totals_out_of_bounds(total: int) -> None:
    """Three entries in [1, 4] share 3 to 12, nothing else."""
    with pytest.raises(ValueError, match=rf"cannot share {total} among 3 within \[1, 4\]"):
        share_out([Fraction(2)] * 3, total, floor=1, cap=4)


@pytest.mark.parametrize("floor", [0, 1])
def test_share_out_is_nearest_by_brute_force(floor: int) -> None:
    """No other way to share lies nearer to the quotas."""
    tenths = [0, 3, 5, 12, 18, 25, 40]
    for quotas_in_tenths in itertools.product(tenths, repeat=3):
        quotas = [Fraction(n, 10) for n in quotas_in_tenths]
        total = sum(quotas_in_tenths) // 10
        if sum(quotas) != total or total < 3 * floor:
            continue
        shares = share_out(quotas, total, floor=floor, cap=4)
        assert tuple(shares) in oracles.nearest_shares(quotas, total, floor, 4)


def test_plan_worked_example() -> None:
    """1000 tokens at a quarter: 62 blocks over 4 bands, 12 for recent tokens, 50 down the pyramid.

    P=1000, r=32, bs=16: 63 blocks, tail_block 60, 3 recent blocks a band; 0.25 * 1000 * 4 / 16 =
    62.5. r_c = 50 / 240; the layers fall from 0.3667 to 0.05; the bands' quotas are 20.64,
    15.21, 9.79, 4.36.
    """
    plan = _plan(1000, Fraction(1, 4))
    assert {(p.tail_block, p.prompt_blocks) for p in plan} == {(60, 63)}
    assert [p.reduced_blocks for p in plan] == [21, 15, 10, 4]
    assert [p.first_block for p in plan] == [39, 45, 50, 56]


def test_plan_rounds_no_earlier_than_blocks() -> None:
    """0.29 of 100 one-token blocks is 29: the product of fractions is rounded, once."""
    (plan,) = _plan(100, Fraction(29, 100), recent=1, block_size=1, bands=split_layers(1, 1))
    assert plan.held_blocks == 29


def test_plan_uniform_gives_every_band_the_same() -> None:
    """The same fifty blocks, shared evenly, the odd ones to the shallow bands."""
    plan = _plan(1000, Fraction(1, 4), shape="uniform")
    assert [p.reduced_blocks for p in plan] == [13, 13, 12, 12]


def test_plan_gives_every_band_a_unit_before_the_pyramid() -> None:
    """A deepest band whose quota is below one unit still sees one unit of context."""
    plan = _plan(400, Fraction(1, 5), bands=split_layers(8, 8), beta=Fraction(0))
    reduced = [p.reduced_blocks for p in plan]
    assert sum(reduced) == int(Fraction(1, 5) * 400 * 8 / 16) - 8 * 2
    assert min(reduced) == 1


def test_plan_keeps_recent_tokens_beyond_the_budget() -> None:
    """One percent of 1000 tokens is less than the recent tokens, which stay, alone."""
    plan = _plan(1000, Fraction(1, 100))
    assert {p.reduced_blocks for p in plan} == {0}
    assert {p.held_blocks for p in plan} == {3}


@pytest.mark.parametrize(
    ("prompt_len", "keep_ratio", "min_prompt_len"),
    [(1000, Fraction(1), 0), (32, Fraction(1, 4), 0), (7, Fraction(1, 4), 0)]
    + [(127, Fraction(1, 4), 128)],
)
def test_plan_keeps_whole(prompt_len: int, keep_ratio: Fraction, min_prompt_len: int) -> None:
    """Ratio one, recent tokens alone, or below the minimum: nothing is moved or freed."""
    for plan in _plan(prompt_len, keep_ratio, min_prompt_len=min_prompt_len):
        assert not plan.is_reduced
        assert plan.held_blocks == plan.prompt_blocks == num_blocks(prompt_len, 16)


def test_plan_reduces_from_the_minimum_length_on() -> None:
    """A prompt of exactly the minimum is reduced."""
    assert all(p.is_reduced for p in _plan(128, Fraction(3, 5), min_prompt_len=128))


def test_plan_units_are_whole() -> None:
    """With one block per query head of four, every region is a multiple of four blocks."""
    plan = _plan(1000, Fraction(1, 4), unit_blocks=4)
    assert [p.reduced_blocks for p in plan] == [20, 16, 8, 4]


def test_plan_charges_for_the_padding_of_uneven_bands() -> None:
    """Bands of 4, 3, 3, 3 layers cost 4 layers each: 13/16 of the blocks that 16 layers get."""
    plan = _plan(1600, Fraction(1, 2), bands=split_layers(13, 4))
    assert sum(p.held_blocks for p in plan) == int(Fraction(1, 2) * 100 * 13 / 4)


@pytest.mark.parametrize("unit_blocks", [1, 3])
@pytest.mark.parametrize("num_layers", [8, 7, 9])
@pytest.mark.parametrize("percent", [1, 7, 29, 50, 93])
def test_plan_spends_what_adding_one_by_one_spends(
    unit_blocks: int, num_layers: int, percent: int
) -> None:
    """The units over all bands are the most that fit, by trial."""
    bands = split_layers(num_layers, 4)
    lengths = [len(band) for band in bands]
    for prompt_len in (1, 31, 33, 48, 100, 333, 1024):
        keep_ratio = Fraction(percent, 100)
        plan = _plan(prompt_len, keep_ratio, bands=bands, unit_blocks=unit_blocks)
        tail_block = max(0, prompt_len - 32) // 16
        expected = oracles.most_region_units(
            prompt_len, keep_ratio, tail_block, 16, lengths, unit_blocks
        )
        assert sum(p.reduced_blocks for p in plan) == expected * unit_blocks

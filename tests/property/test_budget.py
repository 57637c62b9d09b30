"""What holds for every plan."""

import math
from dataclasses import dataclass
from fractions import Fraction

from hypothesis import assume, example, given
from hypothesis import strategies as st

import oracles
from vllm_spindle.core.bands import split_layers
from vllm_spindle.core.budget import BandPlan, plan_prompt, share_out

KEEP_RATIOS = st.fractions(min_value=Fraction(1, 1000), max_value=1, max_denominator=1000)
BETAS = st.sampled_from([Fraction(0), Fraction(1, 20)]) | st.fractions(
    min_value=0, max_value=Fraction(99, 100), max_denominator=100
)


@dataclass(frozen=True)
class Case:
    """Everything that a plan depends on but the keep ratio."""

    prompt_len: int
    recent: int
    block_size: int
    num_layers: int
    num_bands: int
    beta: Fraction
    shape: str
    unit_blocks: int
    protected_tokens: int = 0

    @property
    def band_layers(self) -> list[int]:
        """Layers of each band."""
        return [len(band) for band in split_layers(self.num_layers, self.num_bands)]

    def plan(self, keep_ratio: Fraction, min_prompt_len: int = 0) -> tuple[BandPlan, ...]:
        """The plan at a keep ratio."""
        return plan_prompt(
            self.prompt_len,
            keep_ratio=keep_ratio,
            recent=self.recent,
            block_size=self.block_size,
            bands=split_layers(self.num_layers, self.num_bands),
            beta=self.beta,
            shape=self.shape,
            unit_blocks=self.unit_blocks,
            min_prompt_len=min_prompt_len,
            protected_tokens=self.protected_tokens,
        )

    @property
    def rest_len(self) -> int:
        """Tokens after the protected prefix: what the ratio speaks of."""
        tail = max(0, self.prompt_len - self.recent) // self.block_size
        return self.prompt_len - min(self.protected_tokens // self.block_size, tail) * (
            self.block_size
        )

    def held_bytes(self, plan: tuple[BandPlan, ...]) -> int:
        """Cost of a plan's blocks, a protected prefix apart."""
        held = [p.held_blocks - p.prefix_blocks for p in plan]
        return oracles.cache_bytes(held, self.block_size, self.band_layers)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Prompts of 1 to 5000 tokens on models of 1 to 40 layers, even and uneven bands."""
    num_layers = draw(st.integers(1, 40))
    return Case(
        prompt_len=draw(st.integers(1, 5000)),
        recent=draw(st.integers(1, 128)),
        block_size=draw(st.sampled_from([1, 8, 16, 32, 128])),
        num_layers=num_layers,
        num_bands=draw(st.integers(1, min(8, num_layers))),
        beta=draw(BETAS),
        shape=draw(st.sampled_from(["pyramid", "uniform"])),
        unit_blocks=draw(st.sampled_from([1, 1, 2, 4, 7])),
        protected_tokens=draw(st.just(0) | st.integers(0, 6000)),
    )


@given(cases(), KEEP_RATIOS)
def test_a_plan_holds_no_more_bytes_than_asked(case: Case, keep_ratio: Fraction) -> None:
    """Whole blocks and padding layers fit in the ratio's bytes, or only recent tokens are held."""
    assume(keep_ratio < 1)
    plan = case.plan(keep_ratio)
    allowed = keep_ratio * case.rest_len * case.num_layers
    if any(p.is_reduced for p in plan) and case.held_bytes(plan) > allowed:
        assert {p.reduced_blocks for p in plan} == {0}


@given(cases(), KEEP_RATIOS)
def test_a_plan_leaves_no_unit_unspent(case: Case, keep_ratio: Fraction) -> None:
    """One unit more would not fit in the bytes, unless there is no context left to keep."""
    assume(keep_ratio < 1)
    plan = case.plan(keep_ratio)
    room = [p.freed_blocks >= case.unit_blocks for p in plan]
    one_more = case.unit_blocks * case.block_size * max(case.band_layers)
    allowed = keep_ratio * case.rest_len * case.num_layers
    assert not any(room) or case.held_bytes(plan) + one_more > allowed


@given(cases(), KEEP_RATIOS)
def test_regions_lie_before_the_window(case: Case, keep_ratio: Fraction) -> None:
    """Each region lies within the context, the window's first token in or behind the tail."""
    plan = case.plan(keep_ratio)
    assert len(plan) == case.num_bands
    for band in plan:
        assert 0 <= band.prefix_blocks <= band.first_block <= band.tail_block
        assert band.tail_block <= band.prompt_blocks
        assert not band.is_reduced or band.prefix_blocks == case.protected_tokens // case.block_size
        assert band.prompt_blocks == math.ceil(Fraction(case.prompt_len, case.block_size))
        first_of_window = max(0, case.prompt_len - case.recent)
        assert band.tail_block == first_of_window // case.block_size


@given(cases(), KEEP_RATIOS)
def test_regions_are_whole_units(case: Case, keep_ratio: Fraction) -> None:
    """What is reduced is a multiple of the unit, in every band."""
    for band in case.plan(keep_ratio):
        assert not band.is_reduced or band.reduced_blocks % case.unit_blocks == 0


@given(cases(), KEEP_RATIOS)
def test_deeper_bands_keep_no_more(case: Case, keep_ratio: Fraction) -> None:
    """Down the bands the region never grows; a uniform one varies by at most a unit."""
    reduced = [band.reduced_blocks for band in case.plan(keep_ratio)]
    assert reduced == sorted(reduced, reverse=True)
    if case.shape == "uniform":
        assert reduced[0] - reduced[-1] <= case.unit_blocks


@example(Case(400, 32, 16, 8, 8, Fraction(0), "pyramid", 1), Fraction(1, 5))
@given(cases(), KEEP_RATIOS)
def test_every_band_sees_context_before_any_sees_two(case: Case, keep_ratio: Fraction) -> None:
    """No band is left with its window alone while another holds more than one unit."""
    reduced = [band.reduced_blocks for band in case.plan(keep_ratio)]
    assert min(reduced) > 0 or max(reduced) <= case.unit_blocks


@given(cases())
def test_ratio_one_keeps_all(case: Case) -> None:
    """At 1.0 no block is freed."""
    for band in case.plan(Fraction(1)):
        assert not band.is_reduced
        assert band.held_blocks * case.block_size >= case.prompt_len


@given(cases(), KEEP_RATIOS, st.integers(1, 5000))
def test_short_prompts_are_kept_whole(
    case: Case, keep_ratio: Fraction, min_prompt_len: int
) -> None:
    """A prompt within its window, or below the minimum, frees nothing; else the minimum is idle."""
    plan = case.plan(keep_ratio, min_prompt_len)
    if case.prompt_len <= case.recent or case.rest_len < min_prompt_len:
        assert not any(band.is_reduced for band in plan)
    else:
        assert plan == case.plan(keep_ratio)


@given(cases(), KEEP_RATIOS, KEEP_RATIOS)
def test_a_larger_ratio_holds_no_fewer_blocks(case: Case, one: Fraction, other: Fraction) -> None:
    """The blocks held over all bands are monotone in the keep ratio."""
    low, high = (
        sum(band.held_blocks for band in case.plan(ratio)) for ratio in sorted([one, other])
    )
    assert low <= high


@st.composite
def sharings(draw: st.DrawFn) -> tuple[list[Fraction], int, int]:
    """Quotas of up to four entries in [0, 4] that sum to a whole total, and a feasible floor."""
    quota = st.fractions(min_value=0, max_value=4, max_denominator=12)
    quotas = draw(st.lists(quota, min_size=0, max_size=3))
    last = -sum(quotas) % 1 + draw(st.integers(0, 3))
    quotas.insert(draw(st.integers(0, len(quotas))), Fraction(last))
    total = int(sum(quotas))
    return quotas, total, draw(st.integers(0, min(1, total // len(quotas))))


@given(sharings())
def test_no_sharing_is_nearer(sharing: tuple[list[Fraction], int, int]) -> None:
    """Shares meet the total within the bounds, and no other sharing is nearer to the quotas."""
    quotas, total, floor = sharing
    shares = share_out(quotas, total, floor=floor, cap=4)
    assert tuple(shares) in oracles.nearest_shares(quotas, total, floor, 4)

"""Layers to bands, and the pyramid: worked examples."""

from fractions import Fraction

import pytest

import oracles
from vllm_spindle.core.bands import (
    band_ratios,
    default_num_bands,
    pyramid_ratios,
    split_layers,
    usable_num_bands,
)

BETA = Fraction(1, 20)


@pytest.mark.parametrize(
    ("num_layers", "num_bands"),
    [(1, 1), (2, 2), (3, 3), (4, 4), (5, 5), (6, 3), (7, 7), (10, 5), (15, 3), (26, 2), (28, 4)]
    + [(32, 4), (36, 4), (40, 4), (80, 4), (11, 3), (13, 4), (61, 4)],
)
def test_default_is_the_divisor_nearest_to_four(num_layers: int, num_bands: int) -> None:
    """The divisor from 2 to 8 nearest to four, ties down, or up to four uneven bands."""
    assert default_num_bands(num_layers) == num_bands


def test_default_refuses_a_model_without_layers() -> None:
    """No layers, no bands: the refusal names the count."""
    with pytest.raises(ValueError, match="num_layers must be at least 1, got 0"):
        default_num_bands(0)


@pytest.mark.parametrize(
    ("num_layers", "usable"), [(1, [1]), (6, [1, 2, 3, 6]), (7, [1, 2, 7]), (11, [1, 2, 3, 11])]
)
def test_usable_numbers_of_bands(num_layers: int, usable: list[int]) -> None:
    """Usable are those whose longest band has less than 1.5 times the shortest's layers."""
    assert usable_num_bands(num_layers) == usable


def test_split_puts_the_longer_bands_first() -> None:
    """Seven layers in three bands are 3 + 2 + 2, in order."""
    assert split_layers(7, 3) == (range(0, 3), range(3, 5), range(5, 7))


@pytest.mark.parametrize("num_bands", [0, 5, -1])
def test_split_refuses_counts_outside_one_to_layers(num_bands: int) -> None:
    """A number of bands below one or above the layers is refused with both numbers."""
    with pytest.raises(ValueError, match=rf"num_bands .* layers \(4\), got {num_bands}"):
        split_layers(4, num_bands)


def test_pyramid_reproduces_the_worked_example() -> None:
    """m=32, l=4096, l_w=32, r=0.4: the shallowest keeps 0.7406, the deepest beta."""
    context_ratio = Fraction(4 * 4096 - 320, 40640)
    ratios = pyramid_ratios(32, context_ratio, BETA)
    assert float(ratios[0]) == pytest.approx(0.7406, abs=5e-5)
    assert ratios[-1] == BETA


def test_pyramid_above_alpha_saturates_the_first_layer() -> None:
    """Above alpha the first layer keeps all and the last 2 r_c - 1, the corrected sign."""
    ratios = pyramid_ratios(3, Fraction(3, 4), BETA)
    assert ratios == [1, Fraction(3, 4), Fraction(1, 2)]


def test_pyramid_branches_meet_at_alpha() -> None:
    """At r_c = alpha the first layer keeps all and the last exactly beta."""
    ratios = pyramid_ratios(5, (1 + BETA) / 2, BETA)
    assert (ratios[0], ratios[-1]) == (1, BETA)


def test_pyramid_is_flat_at_or_below_beta() -> None:
    """Where the paper defines nothing, every layer keeps r_c."""
    assert pyramid_ratios(4, BETA, BETA) == [BETA] * 4
    assert pyramid_ratios(4, Fraction(1, 50), BETA) == [Fraction(1, 50)] * 4


def test_pyramid_of_one_layer_is_its_mean() -> None:
    """A single layer keeps r_c, in every branch."""
    for context_ratio in (Fraction(1, 50), Fraction(1, 4), Fraction(3, 4)):
        assert pyramid_ratios(1, context_ratio, BETA) == [context_ratio]


@pytest.mark.parametrize("percent", [0, 3, 5, 20, 40, 52, 53, 80, 100])
def test_pyramid_equals_the_printed_formula(percent: int) -> None:
    """The fractions equal eq. 4-6 computed in floats."""
    ratios = pyramid_ratios(7, Fraction(percent, 100), BETA)
    expected = oracles.pyramid(7, percent / 100, float(BETA))
    assert [float(r) for r in ratios] == pytest.approx(expected)


@pytest.mark.parametrize("context_ratio", [Fraction(-1, 100), Fraction(101, 100)])
def test_pyramid_refuses_ratios_outside_zero_to_one(context_ratio: Fraction) -> None:
    """A share below 0 or above 1 is refused with its value."""
    with pytest.raises(ValueError, match=rf"context_ratio .* got {context_ratio}"):
        pyramid_ratios(4, context_ratio, BETA)


def test_band_ratio_is_the_mean_of_its_layers() -> None:
    """Uneven bands each average their own layers."""
    layers = [Fraction(n, 10) for n in (9, 6, 3, 1, 0)]
    bands = (range(0, 3), range(3, 5))
    assert band_ratios(layers, bands) == [Fraction(6, 10), Fraction(1, 20)]

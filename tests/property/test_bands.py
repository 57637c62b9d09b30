"""What holds for every pyramid and every split."""

from fractions import Fraction

from hypothesis import given
from hypothesis import strategies as st

from vllm_spindle.core.bands import band_ratios, default_num_bands, pyramid_ratios, split_layers

SHARES = st.fractions(min_value=0, max_value=1, max_denominator=1000)
LAYERS = st.integers(1, 100)


@given(LAYERS, SHARES, SHARES)
def test_the_mean_over_layers_is_the_context_ratio(
    num_layers: int, context_ratio: Fraction, beta: Fraction
) -> None:
    """The mean is r_c exactly, in every branch and below beta."""
    ratios = pyramid_ratios(num_layers, context_ratio, beta)
    assert len(ratios) == num_layers
    assert sum(ratios) == context_ratio * num_layers


@given(LAYERS, SHARES, SHARES)
def test_a_pyramid_never_widens_and_stays_within_bounds(
    num_layers: int, context_ratio: Fraction, beta: Fraction
) -> None:
    """Shares fall by one constant step from at most 1 to at least 0."""
    ratios = pyramid_ratios(num_layers, context_ratio, beta)
    steps = {b - a for a, b in zip(ratios, ratios[1:], strict=False)}
    assert len(steps) <= 1
    assert all(step <= 0 for step in steps)
    assert 0 <= ratios[-1] <= ratios[0] <= 1


@given(st.integers(2, 100), SHARES, SHARES)
def test_the_deepest_layer_keeps_beta_until_the_first_is_full(
    num_layers: int, context_ratio: Fraction, beta: Fraction
) -> None:
    """Above beta, either the deepest layer keeps exactly beta or the shallowest keeps all."""
    ratios = pyramid_ratios(num_layers, context_ratio, beta)
    if context_ratio <= beta:
        assert set(ratios) == {context_ratio}
    else:
        assert ratios[-1] == beta or (ratios[0] == 1 and ratios[-1] > beta)


@given(LAYERS, SHARES, SHARES, SHARES)
def test_a_larger_context_ratio_takes_from_no_layer(
    num_layers: int, beta: Fraction, one: Fraction, other: Fraction
) -> None:
    """Every layer's share is monotone in r_c."""
    low = pyramid_ratios(num_layers, min(one, other), beta)
    high = pyramid_ratios(num_layers, max(one, other), beta)
    assert all(a <= b for a, b in zip(low, high, strict=True))


@given(st.data())
def test_bands_partition_the_layers(data: st.DataObject) -> None:
    """Bands are consecutive, cover each layer once, and differ by at most one, longer first."""
    num_layers = data.draw(LAYERS)
    bands = split_layers(num_layers, data.draw(st.integers(1, num_layers)))
    assert [layer for band in bands for layer in band] == list(range(num_layers))
    lengths = [len(band) for band in bands]
    assert lengths == sorted(lengths, reverse=True)
    assert lengths[0] - lengths[-1] <= 1


@given(LAYERS)
def test_the_default_can_always_be_split(num_layers: int) -> None:
    """The default number of bands is 1 to 8 and never above the layers; even where it can be."""
    num_bands = default_num_bands(num_layers)
    assert 1 <= num_bands <= min(8, num_layers)
    has_divisor = any(num_layers % n == 0 for n in range(2, 9))
    assert (num_layers % num_bands == 0) or not has_divisor


@given(st.data())
def test_band_shares_weigh_as_their_layers(data: st.DataObject) -> None:
    """Band ratios, weighted by their layers, have the layers' mean."""
    num_layers = data.draw(st.integers(1, 12))
    bands = split_layers(num_layers, data.draw(st.integers(1, num_layers)))
    ratios = data.draw(st.lists(SHARES, min_size=num_layers, max_size=num_layers))
    per_band = band_ratios(ratios, bands)
    assert sum(r * len(b) for r, b in zip(per_band, bands, strict=True)) == sum(ratios)

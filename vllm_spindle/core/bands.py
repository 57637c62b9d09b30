"""Layers to bands, and the share of the context that each band keeps (the pyramid).

A band is a run of layers of similar depth that shares one budget and, in the engine, one
KV-cache group. Numbers only: the scheduler side imports this file, so no torch here.

Method: SpindleKV sec. 3.2, eq. 4-6 (arXiv:2507.06517). Differs from the paper: the sign of the
second branch of eq. 5 is corrected (2 r_c - 1, not 1 - 2 r_c), and at or below beta, where the
paper defines nothing, every layer keeps r_c. With both, the mean over layers is r_c exactly.
"""

from collections.abc import Sequence
from fractions import Fraction

MAX_DEFAULT_BANDS = 8
PREFERRED_BANDS = 4


def default_num_bands(num_layers: int) -> int:
    """Number of equal bands for a model: the divisor of ``num_layers`` nearest to four.

    Divisors from 2 to 8 are considered (each band costs the engine a block table and a metadata
    build per step), ties go to the smaller. A model without such a divisor gets up to four uneven
    bands, for which vLLM pads the smaller groups.

    Raises:
        ValueError: if ``num_layers`` is not positive.
    """
    if num_layers < 1:
        raise ValueError(f"num_layers must be at least 1, got {num_layers}")
    divisors = [n for n in range(2, MAX_DEFAULT_BANDS + 1) if num_layers % n == 0]
    if not divisors:
        return max(n for n in usable_num_bands(num_layers) if n <= PREFERRED_BANDS)
    return min(divisors, key=lambda n: (abs(n - PREFERRED_BANDS), n))


def usable_num_bands(num_layers: int) -> list[int]:
    """The numbers of bands whose groups vLLM keeps whole, ascending; 1 is always among them.

    vLLM pads the shorter groups while the longest has less than 1.5 times the layers of the
    shortest, and otherwise cuts every group to the shortest: a band would be several groups
    (``_get_kv_cache_groups_uniform_page_size``). 11 layers in 4 bands: 3, 3, 3, 2 is cut.
    """
    return [n for n in range(1, num_layers + 1) if 2 * -(-num_layers // n) < 3 * (num_layers // n)]


def split_layers(num_layers: int, num_bands: int) -> tuple[range, ...]:
    """Consecutive runs of layers, one per band, sizes equal or differing by one.

    The longer bands come first: shallow layers keep more, so a padded (shorter) group wastes
    its padding where fewer blocks are held.

    Raises:
        ValueError: if there are more bands than layers, or fewer than one band.
    """
    if not 1 <= num_bands <= num_layers:
        raise ValueError(
            f"num_bands must be between 1 and the number of layers ({num_layers}), got {num_bands}"
        )
    size, longer = divmod(num_layers, num_bands)
    runs, start = [], 0
    for band in range(num_bands):
        stop = start + size + (band < longer)
        runs.append(range(start, stop))
        start = stop
    return tuple(runs)


def pyramid_ratios(num_layers: int, context_ratio: Fraction, beta: Fraction) -> list[Fraction]:
    """Share of the context kept per layer, shallow to deep: an arithmetic progression.

    Args:
        num_layers: layers of the model (m in the paper).
        context_ratio: mean share of the context to keep (r_c), 0 to 1.
        beta: share kept by the deepest layer while the pyramid is not saturated, 0 to 1.

    Returns:
        ``num_layers`` fractions in [0, 1], non-increasing, whose mean is ``context_ratio``.
    """
    if not 0 <= context_ratio <= 1:
        raise ValueError(f"context_ratio must be in [0, 1], got {context_ratio}")
    alpha = (1 + beta) / 2
    if context_ratio <= beta:
        first = last = context_ratio
    elif context_ratio <= alpha:
        first, last = 2 * context_ratio - beta, beta
    else:
        first, last = Fraction(1), 2 * context_ratio - 1
    if num_layers == 1:
        return [context_ratio]
    step = (last - first) / (num_layers - 1)
    return [first + step * layer_idx for layer_idx in range(num_layers)]


def band_ratios(layer_ratios: Sequence[Fraction], bands: Sequence[range]) -> list[Fraction]:
    """Mean layer ratio of each band."""
    return [sum((layer_ratios[i] for i in band), Fraction(0)) / len(band) for band in bands]

"""The choice rule: per band the method that moves attention least, if it holds as a whole.

A band's methods are compared by the error of its attention outputs at the answer's queries: only
those see a reduced context in serving (the window's queries chose what eviction keeps, and so
flatter it). Divergence of one band alone is mostly noise and decides nothing; of the whole plan it
has the last word.
"""

from collections.abc import Mapping, Sequence

from vllm_spindle.calibration.measure import METHODS, BandMeasure, Bench, Measured, WholeMeasure
from vllm_spindle.config import MethodName

MARGIN = 0.05
"""Codebooks must beat eviction by this share: building them takes time."""
NOISE_ERROR = 2**-8
"""Relative; bf16 rounds as much."""
NOISE_NATS = 1e-3


def choose_method(measures: Mapping[MethodName, BandMeasure]) -> MethodName:
    """The method of one band: least error, eviction unless clearly beaten."""
    best = min(METHODS, key=lambda method: (measures[method].answer_error, METHODS.index(method)))
    evicted, found = measures["evict"].answer_error, measures[best].answer_error
    return best if found < (1 - MARGIN) * evicted and evicted - found > NOISE_ERROR else "evict"


def choose_whole(candidates: Sequence[WholeMeasure]) -> WholeMeasure:
    """Least divergence; among those within noise of it, the first."""
    least = min(whole.divergence for whole in candidates)
    return next(whole for whole in candidates if whole.divergence <= least + NOISE_NATS)


def choose_plan(measured: Sequence[Measured]) -> Measured:
    """The configuration whose choice is best; among equals the first."""
    chosen = choose_whole([each.chosen for each in measured])
    return next(each for each in measured if each.chosen is chosen)


def measure_bands(bench: Bench) -> Measured:
    """Measure every method in every band, choose, and hold the choice against one for all.

    Bands are measured one at a time; together they may disappoint. So the plan that the bands
    chose competes with each method everywhere. It goes first: equals are its to win.
    """
    num_bands = len(bench.policy.bands)
    by_band = tuple({m: bench.band(band, m) for m in METHODS} for band in range(num_bands))
    plans = [tuple(choose_method(measures) for measures in by_band)]
    plans += [plan for method in METHODS if (plan := (method,) * num_bands) not in plans]
    wholes = [bench.whole(plan) for plan in plans]
    return Measured(
        config=bench.policy.config,
        bands=bench.policy.bands,
        by_band=by_band,
        wholes=tuple(wholes),
        chosen=choose_whole(wholes),
    )

"""Percentile intervals of means, by drawing the samples again, task by task."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

NUM_DRAWS = 2000
COVERAGE = 0.95


@dataclass(frozen=True, slots=True)
class Interval:
    """A mean and where it would lie on other samples of the kind."""

    mean: float
    low: float
    high: float

    def as_json(self) -> dict[str, float]:
        """In percent."""
        return {
            "percent": round(100 * self.mean, 2),
            "low": round(100 * self.low, 2),
            "high": round(100 * self.high, 2),
        }


def mean_interval(strata: Sequence[Sequence[float]], *, seed: int = 0) -> Interval:
    """The mean of the strata's means, with its 95 % interval.

    Args:
        strata: one value a sample, task by task: each task weighs the same, whatever its samples,
            and is drawn again by itself.
        seed: of the draws.

    Raises:
        ValueError: if there is no stratum, or an empty one.
    """
    if not strata or not all(map(len, strata)):
        raise ValueError("no values to average")
    rng = np.random.default_rng(seed)
    means = np.zeros(NUM_DRAWS)
    for values in strata:
        drawn = rng.integers(len(values), size=(NUM_DRAWS, len(values)))
        means += np.asarray(values, dtype=np.float64)[drawn].mean(axis=1) / len(strata)
    means.sort()
    cut = round((1 - COVERAGE) / 2 * NUM_DRAWS)
    mean = sum(sum(values) / len(values) for values in strata) / len(strata)
    return Interval(mean, float(means[cut]), float(means[-1 - cut]))


def difference_interval(
    ours: Sequence[Sequence[float]], others: Sequence[Sequence[float]], *, seed: int = 0
) -> Interval:
    """Mean of the differences sample by sample: what the samples share cancels."""
    strata = [
        [a - b for a, b in zip(mine, other, strict=True)]
        for mine, other in zip(ours, others, strict=True)
    ]
    return mean_interval(strata, seed=seed)

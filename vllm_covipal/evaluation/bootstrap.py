"""Percentile intervals of means, by drawing the questions again."""

import random
from collections.abc import Sequence
from dataclasses import dataclass

NUM_DRAWS = 2000
COVERAGE = 0.95


@dataclass(frozen=True, slots=True)
class Interval:
    """A mean and where it would lie on other questions of the kind."""

    mean: float
    low: float
    high: float


def mean_interval(values: Sequence[float], *, seed: int = 0) -> Interval:
    """The mean of one value a question, with its 95 % interval.

    Raises:
        ValueError: if there are none.
    """
    if not values:
        raise ValueError("no values to average")
    rng = random.Random(seed)
    count = len(values)
    means = sorted(sum(rng.choices(values, k=count)) / count for _ in range(NUM_DRAWS))
    cut = round((1 - COVERAGE) / 2 * NUM_DRAWS)
    return Interval(sum(values) / count, means[cut], means[-1 - cut])


def difference_interval(ours: Sequence[float], others: Sequence[float]) -> Interval:
    """Mean of the differences question by question: what the questions share cancels."""
    return mean_interval([a - b for a, b in zip(ours, others, strict=True)])

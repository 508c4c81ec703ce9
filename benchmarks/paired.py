"""Means over seeds, and differences between runs of the same seed."""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from scipy import stats

_CONFIDENCE = 0.95


class Estimate(NamedTuple):
    """A mean and how far it can be trusted.

    Attributes:
        count: number of samples.
        mean: their mean.
        deviation: their sample standard deviation, of n - 1; None for one sample.
        margin: half of the 95 % interval of the mean by Student's t; None for one.
    """

    count: int
    mean: float
    deviation: float | None
    margin: float | None


def estimate(samples: Sequence[float]) -> Estimate | None:
    """Return the mean of samples; None if there are none.

        margin = t(0.975, n - 1) * deviation / sqrt(n)

    References:
        Student, `The Probable Error of a Mean <https://doi.org/10.2307/2331554>`_, 1908
    """
    count = len(samples)
    if count == 0:
        return None
    mean = math.fsum(samples) / count
    if count == 1:
        return Estimate(count, mean, None, None)
    squares = math.fsum((sample - mean) ** 2 for sample in samples)
    deviation = math.sqrt(squares / (count - 1))
    quantile = float(stats.t.ppf((1 + _CONFIDENCE) / 2, count - 1))
    return Estimate(count, mean, deviation, quantile * deviation / math.sqrt(count))


def differences(
    samples: Mapping[int, float], others: Mapping[int, float]
) -> list[float]:
    """Return samples less others, of the seeds that have both."""
    return [samples[seed] - others[seed] for seed in samples if seed in others]


def ratios(samples: Mapping[int, float], others: Mapping[int, float]) -> list[float]:
    """Return samples over others, of the seeds that have both."""
    return [samples[seed] / others[seed] for seed in samples if seed in others]

"""Means with bootstrap confidence intervals."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

__all__ = ["FEWEST", "RESAMPLES", "Interval", "mean_interval", "mean_of_means", "ratio_interval"]

RESAMPLES = 2000
# of fewer samples the percentile bootstrap is clearly too narrow
FEWEST = 10
_CONFIDENCE = 0.95
Values = NDArray[np.float64]


class Interval(NamedTuple):
    """An estimate and its 95 % interval, which groups of fewer than two samples have not."""

    value: float
    low: float | None = None
    high: float | None = None


def mean_interval(values: Sequence[float], seed: int = 0) -> Interval:
    """Return the mean, the samples resampled."""
    found = np.asarray(values, dtype=np.float64)
    return _interval([found], lambda parts: parts[0].mean(-1), seed)


def mean_of_means(groups: Sequence[Sequence[float]], seed: int = 0) -> Interval:
    """Return the mean of the groups' means (LongBench's average), resampled within groups."""
    found = [np.asarray(group, dtype=np.float64) for group in groups]
    return _interval(found, lambda parts: np.mean([part.mean(-1) for part in parts], axis=0), seed)


def ratio_interval(
    values: Sequence[float], others: Sequence[float], seed: int = 0
) -> Interval | None:
    """Return mean(values) / mean(others), the pairs resampled; None where the divisor is zero."""
    pairs = np.asarray([values, others], dtype=np.float64).T
    if not pairs[:, 1].any():
        return None

    def ratio(parts: list[Values]) -> Values:
        means = parts[0].mean(-2)
        with np.errstate(divide="ignore", invalid="ignore"):
            found: Values = means[..., 0] / means[..., 1]
        return found

    return _interval([pairs], ratio, seed)


def _interval(
    groups: list[Values], statistic: Callable[[list[Values]], Values], seed: int
) -> Interval:
    if min(map(len, groups)) < 2:
        return Interval(float(statistic(groups)))
    random = np.random.default_rng(seed)
    drawn = [group[random.integers(len(group), size=(RESAMPLES, len(group)))] for group in groups]
    # statistics work on the samples' axis from the end, so that one call takes all resamples
    resampled = statistic(drawn)
    resampled = resampled[np.isfinite(resampled)]
    tail = 100 * (1 - _CONFIDENCE) / 2
    low, high = np.percentile(resampled, [tail, 100 - tail])
    return Interval(float(statistic(groups)), float(low), float(high))

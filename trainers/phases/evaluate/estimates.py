"""From samples to values with 95 % intervals, and to paired differences between models."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from trainers.phases.evaluate.metric import Metric

REPLICATES = 2000
CHUNK = 2**22
"""Resampled numbers held at once."""
Z95 = 1.959963984540054


@dataclass(frozen=True)
class Estimate:
    value: float
    low: float
    high: float
    n: int
    replicates: np.ndarray
    """The statistic of each bootstrap resample. Models with the same rows share the resamples, so they can be paired."""

    def document(self) -> dict[str, float | int | None]:
        return {"value": self.value, "low": finite(self.low), "high": finite(self.high), "n": self.n}


def estimate(metric: Metric, seed: int) -> Estimate:
    """Value and interval of a metric: percentile bootstrap over prompts, Wilson's for proportions."""
    columns = [np.asarray(column, dtype=np.float64) for column in metric.columns]
    n = len(columns[0])
    with np.errstate(all="ignore"):
        value = float(metric.statistic(*columns))
        replicates = bootstrap(metric, columns, seed)
    low, high = wilson(value * n, n) if metric.proportion else interval(replicates)
    return Estimate(value, low, high, n, replicates)


def bootstrap(metric: Metric, columns: Sequence[np.ndarray], seed: int) -> np.ndarray:
    """The statistic of :data:`REPLICATES` resamples of the prompts: a function of seed and number of prompts."""
    n = len(columns[0])
    generator = np.random.default_rng([seed, n])
    parts = []
    rows = max(1, CHUNK // n)
    for first in range(0, REPLICATES, rows):
        chosen = generator.integers(0, n, size=(min(rows, REPLICATES - first), n))
        parts.append(metric.statistic(*(column[chosen] for column in columns)))
    return np.concatenate(parts)


def interval(replicates: np.ndarray) -> tuple[float, float]:
    """The middle 95 %. Resamples in which the statistic is undefined are left out."""
    defined = replicates[np.isfinite(replicates)]
    if not len(defined):
        return math.nan, math.nan
    low, high = np.quantile(defined, [0.025, 0.975])
    return float(low), float(high)


def wilson(hits: float, n: int) -> tuple[float, float]:
    """Wilson's score interval of a proportion (1927).

    >>> [round(x, 4) for x in wilson(8, 10)]
    [0.4902, 0.9433]
    """
    p = hits / n
    middle = (p + Z95**2 / (2 * n)) / (1 + Z95**2 / n)
    half = Z95 / (1 + Z95**2 / n) * math.sqrt(p * (1 - p) / n + Z95**2 / (4 * n * n))
    # Exact at the ends, where rounding would leave the value outside its own interval.
    return (0.0 if p <= 0 else middle - half), (1.0 if p >= 1 else middle + half)


def difference(ours: Estimate, theirs: Estimate) -> dict[str, float | None]:
    """Ours minus theirs with its interval, paired by prompt. Empty when the two have not the same prompts."""
    if ours.n != theirs.n:
        return {}
    low, high = interval(ours.replicates - theirs.replicates)
    return {"value": ours.value - theirs.value, "low": finite(low), "high": finite(high)}


def finite(value: float) -> float | None:
    """JSON has no word for what is undefined but null."""
    return value if math.isfinite(value) else None

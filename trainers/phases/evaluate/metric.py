"""What a benchmark measures: a number for each prompt, and how the numbers become one. Imports neither torch nor numpy.

The estimator (estimates.py) adds the value and its interval, so a benchmark holds no statistics of its own.
"""

from array import array
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

Statistic = Callable[..., Any]
"""Takes one array per column, samples along the last axis, and returns the statistic over that axis. It is called with
(n,) arrays for the value and with (replicates, n) arrays for the bootstrap, so it must use array methods only."""


def average(values: Any) -> Any:
    return values.mean(-1)


def quotient(numerators: Any, denominators: Any) -> Any:
    """A ratio of sums: per-token figures weigh every token alike, not every prompt."""
    return numerators.sum(-1) / denominators.sum(-1)


@dataclass(frozen=True)
class Metric:
    """One figure of one model, as its samples. The rows are prompts: equal rows of two models are paired."""

    key: str
    """Name inside the benchmark, camelCase: `accuracy`, `winRate`."""
    label: str
    """Column header."""
    columns: tuple[Sequence[float], ...]
    """Numbers by prompt, one sequence per argument of ``statistic``."""
    higher_is_better: bool | None = None
    headline: bool = False
    """Part of the short table."""
    statistic: Statistic = average
    proportion: bool = False
    """The samples are 0 or 1; the interval is Wilson's, which is honest near 0 and 1 too."""
    undefined: str | None = None
    """When the statistic has no value although all samples have; None: then something is wrong."""


def share(key: str, label: str, hits: Iterable[float], better: bool | None = None, headline: bool = False) -> Metric:
    """Share of prompts for which something holds."""
    return Metric(key, label, (array("d", hits),), better, headline, proportion=True)

"""Asking Prometheus what Grafana would ask it."""

import re
from dataclasses import dataclass
from typing import Any

from monitoring.prometheus import Prometheus

from dashboards.boards import Query, Scope, label_of


@dataclass(frozen=True)
class Answer:
    rows: list[Any]
    """Series, samples, or label sets."""
    samples: int = 0
    """That Prometheus had to look at."""

    @property
    def numbers(self) -> int:
        """Values that are numbers: a series of NaNs shows nothing."""
        return sum(_numbers(row) for row in self.rows)


def answer(prometheus: Prometheus, query: Query, scope: Scope) -> Answer:
    """Raises QueryFailed."""
    expr = scope.fill(query)
    if query.kind == "variable":
        return Answer(prometheus.series(expr, start=scope.start, end=scope.end))
    if query.kind == "instant":
        rows: list[Any] = prometheus.query(expr, time=scope.end)
        return Answer(rows, _samples(prometheus.get("query", query=expr, time=scope.end, stats="all")))
    step = 30 if query.kind == "annotation" else scope.interval(query)
    span = {"start": scope.start, "end": scope.end, "step": step}
    rows = list(prometheus.query_range(expr, **span))
    return Answer(rows, _samples(prometheus.get("query_range", query=expr, stats="all", **span)))


def values_of(prometheus: Prometheus, name: str, variable: str, scope: Scope, regex: str = "") -> list[str]:
    """What a variable offers."""
    expr, label = label_of(name, variable)
    found = {row[label] for row in answer(prometheus, Query(f"${variable}", expr, "variable"), scope).rows}
    return sorted({m[1] for value in found if (m := re.search(regex, value))} if regex else found)


def _numbers(row: Any) -> int:
    if isinstance(row, dict):
        return 1
    points = [row.value] if hasattr(row, "value") else [value for _, value in row.points]
    return sum(value == value for value in points)


def _samples(data: Any) -> int:
    return int(data["stats"]["samples"]["totalQueryableSamples"])

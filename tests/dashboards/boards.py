"""The dashboards as they are shipped, and what Grafana would ask Prometheus for them."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "helm/alignment-operator/files/dashboards"
Object = dict[str, Any]
Value = str | Sequence[str]


def load() -> dict[str, Object]:
    return {path.stem: json.loads(path.read_text()) for path in sorted(FOLDER.glob("*.json"))}


BOARDS = load()


@dataclass(frozen=True)
class Query:
    """``place`` names it in a report: dashboard, panel or variable, and the query's letter."""

    place: str
    expr: str
    kind: str
    """`range`, `instant`, `variable` or `annotation`."""
    points: float = 1600
    """The most that the panel wants: one per pixel, unless it says."""


@dataclass(frozen=True)
class Scope:
    """What Grafana fills in: chosen values, the time range, how often the data source is scraped."""

    values: Mapping[str, Value]
    start: float
    end: float
    scrape: float = 15

    def interval(self, query: Query) -> float:
        """Seconds between two points of a panel, no finer than the scrapes."""
        return max(self.scrape, _rounded((self.end - self.start) / query.points))

    def fill(self, query: Query) -> str:
        interval, seconds = self.interval(query), self.end - self.start
        builtin = {
            "__interval": f"{interval:g}s",
            "__interval_ms": f"{interval * 1000:g}",
            "__rate_interval": f"{max(interval + self.scrape, 4 * self.scrape):g}s",
            "__range": f"{seconds:.0f}s",
        }

        def value(found: re.Match[str]) -> str:
            name, how = found["name"] or found["plain"], found["how"]
            if name in builtin:
                return builtin[name]
            if name not in self.values:
                raise KeyError(f"{query.place}: ${name} is no variable of this dashboard")
            return _formatted(self.values[name], how)

        return VARIABLE.sub(value, query.expr)


VARIABLE = re.compile(r"\$(?:\{(?P<name>\w+)(?::(?P<how>\w+))?\}|(?P<plain>[a-zA-Z_]\w*))")
"""`$1` in label_replace is none."""


def _formatted(value: Value, how: str | None) -> str:
    """As the Prometheus data source does: several become a group, what means something in a regex is escaped."""
    if value == "$__all":
        return ".*"
    values = [value] if isinstance(value, str) else list(value)
    if how == "regex" or not isinstance(value, str):
        values = [re.sub(r"[\\^$*+?.()|{}\[\]/]", r"\\\\\g<0>", one) for one in values]
    return values[0] if len(values) == 1 else f"({'|'.join(values)})"


def _rounded(seconds: float) -> float:
    """The next of Grafana's steps that is not shorter."""
    return next(
        (step for step in (1, 2, 5, 10, 15, 20, 30, 60, 120, 300, 600, 900, 1800, 3600) if step >= seconds), 7200
    )


def panels(board: Object) -> Iterator[Object]:
    """All but rows' headings."""
    return (panel for panel in board["panels"] if panel["type"] != "row")


def panel_queries(name: str, panel: Object) -> Iterator[Query]:
    for target in panel["targets"]:
        kind = "instant" if target["instant"] else "range"
        points = panel.get("maxDataPoints", 1600 * panel["gridPos"]["w"] / 24)
        yield Query(f"{name}: {panel['title']} ({target['refId']})", target["expr"], kind, points)


def queries(name: str) -> list[Query]:
    """Of every panel, variable and annotation."""
    board = BOARDS[name]
    found = [query for panel in panels(board) for query in panel_queries(name, panel)]
    for variable in board["templating"]["list"]:
        if variable["type"] == "query":
            expr = re.fullmatch(r"label_values\((.+), (\w+)\)", variable["query"]["query"])
            assert expr, variable["query"]
            found.append(Query(f"{name}: ${variable['name']}", expr[1], "variable"))
    for annotation in board["annotations"]["list"]:
        if not annotation.get("builtIn"):
            found.append(Query(f"{name}: {annotation['name']}", annotation["expr"], "annotation"))
    return found


def label_of(name: str, variable: str) -> tuple[str, str]:
    """The series and the label that a variable's values come from."""
    query = next(v for v in BOARDS[name]["templating"]["list"] if v["name"] == variable)["query"]["query"]
    found = re.fullmatch(r"label_values\((.+), (\w+)\)", query)
    assert found
    return found[1], found[2]

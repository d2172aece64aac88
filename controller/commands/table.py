"""The table at the end: models x metrics, from what the evaluation left."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from trainers import json_text


@dataclass(frozen=True)
class Metric:
    key: str
    label: str
    higher_is_better: bool | None
    headline: bool


@dataclass(frozen=True)
class Comparison:
    models: tuple[str, ...]
    metrics: tuple[Metric, ...]
    values: Mapping[str, Mapping[str, Mapping[str, Any]]]

    def shown_metrics(self) -> tuple[Metric, ...]:
        """Headlines if any are marked, else all."""
        return tuple(m for m in self.metrics if m.headline) or self.metrics

    def best(self, metric: Metric) -> float | None:
        """The best value of a metric; None where nothing is better than something else."""
        values = [v for model in self.models if (v := self.value(model, metric)) is not None]
        if metric.higher_is_better is None or len(set(values)) < 2:
            return None
        return max(values) if metric.higher_is_better else min(values)

    def value(self, model: str, metric: Metric) -> float | None:
        cell = self.values.get(model, {}).get(metric.key, {})
        value = cell.get("value")
        return float(value) if isinstance(value, int | float) else None

    def text(self, model: str, metric: Metric) -> str:
        """`0.812 [0.790, 0.834]`, without the interval where there is none."""
        value = self.value(model, metric)
        if value is None:
            return "–"
        cell = self.values[model][metric.key]
        low, high = cell.get("low"), cell.get("high")
        interval = f" [{number(low)}, {number(high)}]" if low is not None and high is not None else ""
        return number(value) + interval


def number(value: float) -> str:
    return f"{value:.3f}" if abs(value) < 100 else f"{value:,.0f}"


def read_comparison(path: Path) -> Comparison | None:
    """The evaluation's `results.json`; None if there is none or it says nothing to compare."""
    try:
        document = json_text.parse(path.read_bytes())
    except (FileNotFoundError, json_text.Malformed):
        return None
    metrics = tuple(_metric(item) for item in document.get("metrics", []))
    if not metrics or not document.get("models"):
        return None
    return Comparison(tuple(map(_name, document["models"])), metrics, document.get("values", {}))


def _name(item: Any) -> str:
    return str(item["name"]) if isinstance(item, Mapping) else str(item)


def _metric(item: Mapping[str, Any]) -> Metric:
    key = str(item["key"])
    # Two benchmarks may measure the same thing in two ways, so the benchmark's name belongs to the label.
    label = f"{key.partition('/')[0]}: {item.get('label') or key}"
    return Metric(key, label, item.get("higherIsBetter"), bool(item.get("headline")))


def comparison_table(comparison: Comparison) -> Table:
    """Models down, metrics across; the best of each column in bold."""
    metrics = comparison.shown_metrics()
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("model", no_wrap=True)
    for metric in metrics:
        arrow = {True: " ↑", False: " ↓", None: ""}[metric.higher_is_better]
        table.add_column(metric.label + arrow, justify="right")
    for model in comparison.models:
        table.add_row(model, *(_cell(comparison, model, metric) for metric in metrics))
    return table


def _cell(comparison: Comparison, model: str, metric: Metric) -> str:
    value, text = comparison.value(model, metric), comparison.text(model, metric).replace("[", r"\[")
    return f"[bold]{text}[/bold]" if value is not None and value == comparison.best(metric) else text


def plain_table(comparison: Comparison) -> Sequence[str]:
    """The same for logs: fixed columns, no styles, never wrapped."""
    metrics = comparison.shown_metrics()
    rows = [["model", *(metric.label for metric in metrics)]]
    rows += [[model, *(comparison.text(model, metric) for metric in metrics)] for model in comparison.models]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]

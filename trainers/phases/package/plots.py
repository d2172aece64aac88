"""Curves of a run as SVG, readable on light and dark pages."""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

from trainers.phases.package.gather import Phase

GREY = "#808894"
BLUE = "#3b82f6"


@dataclass(frozen=True)
class Curve:
    key: str
    """Name in metrics.jsonl."""
    title: str
    unit: str


CURVES = (
    Curve("loss", "Loss", ""),
    Curve("reward", "Reward", "reward-model score or margin"),
    Curve("kl", "KL divergence", "nats per token"),
    Curve("accuracy", "Preference accuracy", "share of pairs"),
    Curve("ess", "Effective sample size", "of the reward weights"),
)


@dataclass(frozen=True)
class Plot:
    name: str
    title: str
    svg: str


def plots_of(phases: Sequence[Phase]) -> list[Plot]:
    """One picture per quantity, a panel per phase that measured it."""
    found = []
    for curve in CURVES:
        series = [(phase.name, *_series(phase.steps, curve.key)) for phase in phases]
        series = [entry for entry in series if len(entry[1]) > 1]
        if series:
            found.append(Plot(curve.key, curve.title, _panels(curve, series)))
    return found


def _series(steps: Sequence[dict[str, Any]], key: str) -> tuple[list[int], list[float]]:
    chosen = [(line["step"], line[key]) for line in steps if isinstance(line.get(key), (int, float))]
    return [step for step, _ in chosen], [float(value) for _, value in chosen]


def smoothed(values: Sequence[float], window: int) -> list[float]:
    """Mean over the last ``window`` values: a value never looks ahead."""
    return [sum(part) / len(part) for i in range(len(values)) if (part := values[max(0, i - window + 1) : i + 1])]


def _panels(curve: Curve, series: Sequence[tuple[str, list[int], list[float]]]) -> str:
    columns = min(3, len(series))
    rows = -(-len(series) // columns)
    # Ids in the SVG are made from the salt: equal input gives equal files.
    with mpl.rc_context(
        {"svg.hashsalt": curve.key, "svg.fonttype": "none", "font.size": 9, "font.family": "sans-serif"}
    ):
        figure = Figure(figsize=(3.4 * columns, 2.5 * rows), layout="constrained")
        axes = figure.subplots(rows, columns, squeeze=False).flatten()
        for axis, (name, steps, values) in zip(axes, series, strict=False):
            _panel(axis, name, steps, values, curve.unit)
        for axis in axes[len(series) :]:
            axis.set_visible(False)
        return _svg(figure)


def _panel(axis: Any, name: str, steps: list[int], values: list[float], unit: str) -> None:
    axis.plot(steps, values, color=BLUE, alpha=0.25, linewidth=0.8)
    axis.plot(steps, smoothed(values, max(1, len(values) // 20)), color=BLUE, linewidth=1.5)
    axis.set_title(name, color=GREY, fontsize=10)
    axis.set_xlabel("step", color=GREY)
    axis.set_ylabel(unit, color=GREY)
    axis.tick_params(colors=GREY, labelsize=8)
    axis.grid(color=GREY, alpha=0.2, linewidth=0.5)
    axis.patch.set_alpha(0)
    for side, spine in axis.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(GREY)


def _svg(figure: Figure) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    return buffer.getvalue()

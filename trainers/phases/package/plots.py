"""Curves from metrics.jsonl and intervals from the evaluation, as SVG that follows the page's light or dark colours."""

import io
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from trainers.phases.package.effects import metric_name
from trainers.phases.package.gather import Evaluation, Phase

COLOURS = {"#1b1f24": "ink", "#6b7280": "muted", "#d8dce2": "grid", "#1f6fb2": "first", "#c4541f": "second"}
"""Colours in the SVG and the page's CSS variables that replace them; the colour stays as the fallback."""
INK, MUTED, GRID, FIRST, SECOND = COLOURS
SIZE = (4.4, 2.7)
"""Inches, so that text is about as large as the page's on a phone, where a figure has its full width."""
POINTS = 240
"""Points per line; longer ones are averaged in buckets."""


@dataclass(frozen=True)
class Curve:
    """A figure about one phase's training."""

    name: str
    title: str
    unit: str
    keys: Mapping[str, str]
    """Key in metrics.jsonl to its name in the legend."""
    types: tuple[str, ...] = ()
    """Phase types it is drawn for; all unless set."""


CURVES = (
    Curve("loss", "Loss", "nats per token", {"loss": "training", "eval_loss": "held out"}, ("sft",)),
    Curve("loss", "Loss", "per pair", {"loss": "training", "eval_loss": "held out"}, ("reward", "dpo")),
    Curve("loss", "Weighted divergence to the teacher", "loss", {"loss": "training"}, ("distill",)),
    Curve("accuracy", "Pairs ranked rightly", "share", {"accuracy": "training", "eval_accuracy": "held out"}),
    Curve("margin", "Reward margin, chosen over rejected", "reward", {"reward": "training"}, ("reward", "dpo")),
    Curve("reward", "Reward of the responses", "reward", {"reward": "mean"}, ("ppo", "distill", "rollout")),
    Curve("kl", "KL to the reference", "nats per token", {"kl": "training"}, ("ppo",)),
    Curve("kl", "KL from the teacher", "nats per token", {"kl": "training"}, ("distill",)),
    Curve("value", "Loss of policy and critic", "loss", {"policy_loss": "policy", "value_loss": "critic"}, ("ppo",)),
    Curve("ess", "Effective sample size of the weights", "responses", {"ess": "per step"}, ("distill",)),
)


@dataclass(frozen=True)
class Plot:
    name: str
    """File name without suffix."""
    caption: str
    svg: str


def training_plots(phase: Phase) -> list[Plot]:
    """Every figure that the phase has numbers for."""
    found = []
    for curve in CURVES:
        series = {label: _series(phase.lines, key) for key, label in curve.keys.items()}
        series = {label: points for label, points in series.items() if len(points[0]) > 1}
        if series and (not curve.types or phase.type in curve.types):
            name = f"{phase.name}-{curve.name}"
            found.append(Plot(name, f"{phase.name}: {curve.title}", draw_curve(name, curve, series)))
    return found


def _series(lines: Sequence[Mapping[str, Any]], key: str) -> tuple[np.ndarray, np.ndarray]:
    """(steps, values) where the key is logged and finite."""
    points = [(row["step"], row[key]) for row in lines if isinstance(row.get(key), int | float)]
    points = [(step, value) for step, value in points if math.isfinite(value)]
    return np.array([p[0] for p in points], dtype=float), np.array([p[1] for p in points], dtype=float)


def draw_curve(name: str, curve: Curve, series: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> str:
    figure, axes = _canvas(SIZE)
    held_out = len(series) > 1
    for (label, points), colour in zip(series.items(), (FIRST, SECOND), strict=False):
        steps, values = map(_thinned, points)
        if len(values) < 12:
            axes.plot(steps, values, color=colour, linewidth=1.6, marker="o", markersize=3, label=label)
        else:
            axes.plot(steps, values, color=colour, linewidth=0.7, alpha=0.35)
            axes.plot(steps, _smoothed(values), color=colour, linewidth=1.8, label=label)
    axes.set_xlabel("step")
    axes.set_ylabel(curve.unit)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(5))
    if held_out:
        axes.legend(frameon=False, fontsize=9, labelcolor=INK, handlelength=1.2)
    return _svg(figure, name)


def _thinned(values: np.ndarray) -> np.ndarray:
    if len(values) <= POINTS:
        return values
    return np.array([part.mean() for part in np.array_split(values, POINTS)])


def _smoothed(values: np.ndarray) -> np.ndarray:
    """Running mean over a twentieth of the line, shorter at its ends."""
    half = max(1, len(values) // 40)
    sums = np.concatenate([[0.0], np.cumsum(values)])
    low = np.maximum(np.arange(len(values)) - half, 0)
    high = np.minimum(np.arange(len(values)) + half + 1, len(values))
    smoothed: np.ndarray = (sums[high] - sums[low]) / (high - low)
    return smoothed


def comparison_plots(evaluation: Evaluation) -> list[Plot]:
    """For every headline metric, all models with their intervals."""
    found = []
    for metric in evaluation.results["metrics"]:
        values = {m: v[metric["key"]] for m, v in evaluation.results["values"].items() if metric["key"] in v}
        values = {m: v for m, v in values.items() if v["low"] is not None}
        if metric["headline"] and len(values) > 1:
            name = f"{evaluation.phase.name}-{metric['key'].replace('/', '-')}"
            found.append(Plot(name, metric_name(evaluation.results, metric), draw_intervals(name, metric, values)))
    return found


def draw_intervals(name: str, metric: Mapping[str, Any], values: Mapping[str, Mapping[str, float]]) -> str:
    figure, axes = _canvas((SIZE[0], 0.75 + 0.27 * len(values)))
    for place, value in enumerate(values.values()):
        axes.plot([value["low"], value["high"]], [place, place], color=FIRST, linewidth=1.6, solid_capstyle="butt")
        axes.plot([value["value"]], [place], color=FIRST, marker="o", markersize=5)
    axes.set_yticks(range(len(values)), list(values))
    axes.set_ylim(len(values) - 0.4, -0.6)
    axes.xaxis.set_major_locator(MaxNLocator(5))
    arrow = {True: "higher is better", False: "lower is better", None: ""}[metric["higherIsBetter"]]
    axes.set_xlabel(f"{metric['label']}{', ' * bool(arrow)}{arrow}")
    axes.grid(axis="y", visible=False)
    axes.tick_params(axis="y", length=0, labelcolor=INK)
    return _svg(figure, name)


def _canvas(size: tuple[float, float]) -> tuple[Figure, Axes]:
    figure = Figure(figsize=size, layout="constrained")
    figure.patch.set_alpha(0)
    axes = figure.add_subplot()
    axes.patch.set_alpha(0)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(GRID)
    axes.tick_params(colors=MUTED, labelsize=9, length=3)
    axes.xaxis.label.set(color=MUTED, size=9)
    axes.yaxis.label.set(color=MUTED, size=9)
    axes.grid(color=GRID, linewidth=0.6)
    axes.set_axisbelow(True)
    return figure, axes


def _svg(figure: Figure, name: str) -> str:
    """The figure as an SVG element: text stays text, ids are unique in a page, colours follow the page's variables."""
    buffer = io.StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": name, "font.family": "sans-serif"}):
        FigureCanvasSVG(figure).print_svg(buffer, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'(id="|url\(#|href="#)', rf"\g<1>{name}-", text)
    text = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px; font-family: system-ui, sans-serif", text)
    for colour, variable in COLOURS.items():
        text = text.replace(colour, f"var(--{variable}, {colour})")
    return re.sub(
        r'<svg ([^>]*?)width="[^"]*"', r"<svg \1", re.sub(r'(<svg [^>]*?)height="[^"]*"', r"\1", text, count=1), count=1
    )

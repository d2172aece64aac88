"""One self-contained HTML page: no scripts, no requests, readable on a phone."""

import base64
from typing import Any

from trainers.phases.package.compare import metric_label, steps_of
from trainers.phases.package.export import environment, flat_settings
from trainers.phases.package.gather import Gathered
from trainers.phases.package.plots import Plot


def report_html(
    gathered: Gathered,
    labels: dict[str, str],
    plots: list[Plot],
    samples: list[dict[str, Any]],
    title: str,
) -> str:
    evaluation = gathered.evaluation
    template = environment().get_template("report.html.j2")
    return template.render(
        title=title,
        run=gathered.run,
        phases=gathered.phases,
        results=evaluation.results if evaluation else None,
        headline=headline(evaluation.results) if evaluation else [],
        latency=evaluation.latency if evaluation else {},
        steps=steps_of(gathered, labels),
        plots=[(plot.title, _data_uri(plot.svg)) for plot in plots],
        samples=samples,
        settings={phase.name: flat_settings(phase.result.settings) for phase in gathered.phases},
        versions=gathered.phases[-1].result.versions if gathered.phases else {},
    )


def headline(results: dict[str, Any]) -> list[dict[str, Any]]:
    """Headline metrics, each with the models that are best in it."""
    chosen = [metric for metric in results["metrics"] if metric.get("headline")]
    return [{**metric, "label": metric_label(metric), "best": _best(results, metric)} for metric in chosen]


def _best(results: dict[str, Any], metric: dict[str, Any]) -> list[str]:
    if metric.get("higherIsBetter") is None:
        return []
    found = {model: values.get(metric["key"], {}).get("value") for model, values in results["values"].items()}
    values = {model: value for model, value in found.items() if value is not None}
    if not values:
        return []
    best = (max if metric["higherIsBetter"] else min)(values.values())
    return [model for model, value in values.items() if value == best]


def _data_uri(svg: str) -> str:
    """As an image, so that ids of several pictures cannot meet and nothing in them can run."""
    return "data:image/svg+xml;base64," + base64.b64encode(svg.encode()).decode()

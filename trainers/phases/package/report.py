"""The report: one HTML file with everything in it, without scripts and without anything to fetch."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from trainers.phases.package.card import data_rows, flat, shown_settings
from trainers.phases.package.effects import Step, benchmark_name, changes, metric_name, steps
from trainers.phases.package.gather import Evaluation, Run
from trainers.phases.package.lineage import graph
from trainers.phases.package.plots import Plot
from trainers.phases.package.templating import render


def report(run: Run, title: str, samples: Mapping[str, Any], plots: Sequence[Plot], compared: Sequence[Plot]) -> str:
    """``samples`` by name of the evaluation; ``plots`` of the training, ``compared`` of the evaluations."""
    return render(
        "report.html.j2",
        title=title,
        run=run,
        evaluations=[_evaluation(run, evaluation) for evaluation in run.evaluations],
        samples=samples,
        plots=[_drawn(plot) for plot in plots],
        compared=[_drawn(plot) for plot in compared],
        lineage=graph(run),
        data=[(phase, data_rows(phase)) for phase in run.phases.values() if phase.result.data],
        settings=[(phase, dict(flat(shown_settings(phase)))) for phase in run.phases.values()],
        versions=versions(run),
        seconds=sum(phase.result.seconds for phase in run.phases.values()),
        finished=max((phase.result.finished_at for phase in run.phases.values()), default=""),
    )


def _drawn(plot: Plot) -> dict[str, Any]:
    """Our own drawing; labels in it were escaped when it was drawn."""
    return {"caption": plot.caption, "svg": Markup(plot.svg)}  # noqa: S704


def _evaluation(run: Run, evaluation: Evaluation) -> dict[str, Any]:
    results = evaluation.results
    return {
        "name": evaluation.phase.name,
        "models": results["models"],
        "baseline": results.get("baseline"),
        "headline": [_column(results, metric) for metric in results["metrics"] if metric["headline"]],
        "others": [_column(results, metric) for metric in results["metrics"] if not metric["headline"]],
        "values": results["values"],
        "notes": results.get("notes", {}),
        "steps": steps(run, evaluation),
        "pairs": _pairs(evaluation),
        "latency": evaluation.latency,
        "n": _sizes(results),
    }


def _column(results: Mapping[str, Any], metric: Mapping[str, Any]) -> dict[str, Any]:
    """A metric with its best value, if one is better than another."""
    found = [v[metric["key"]]["value"] for v in results["values"].values() if metric["key"] in v]
    better = metric["higherIsBetter"]
    best = None if better is None or len(set(found)) < 2 else (max if better else min)(found)
    return {**metric, "benchmark": benchmark_name(metric), "name": metric_name(results, metric), "best": best}


def _pairs(evaluation: Evaluation) -> list[dict[str, Any]]:
    """All differences between any two models on headline metrics."""
    models = evaluation.results["models"]
    return [
        {"model": a, "other": b, "change": change}
        for i, b in enumerate(models)
        for a in models[i + 1 :]
        for change in changes(evaluation, a, b, headline=True)
    ]


def _sizes(results: Mapping[str, Any]) -> tuple[int, int]:
    """Fewest and most prompts behind a figure."""
    counts = [value["n"] for found in results["values"].values() for value in found.values()]
    return (min(counts), max(counts)) if counts else (0, 0)


def versions(run: Run) -> dict[str, str]:
    """Software of the run; a package with several versions shows all."""
    found: dict[str, set[str]] = {}
    for phase in run.phases.values():
        for name, version in phase.result.versions.items():
            found.setdefault(name, set()).add(version)
    return {name: ", ".join(sorted(several)) for name, several in found.items()}


def everything(run: Run) -> str:
    """metrics.json: all results, machine-readable."""
    document = {
        "run": run.name,
        "phases": {name: phase.result.document() for name, phase in run.phases.items()},
        "evaluations": {e.phase.name: e.results for e in run.evaluations},
        "latency": {e.phase.name: e.latency for e in run.evaluations},
        "steps": {e.phase.name: [_step(step) for step in steps(run, e)] for e in run.evaluations},
    }
    return json.dumps(document, indent=1)


def _step(step: Step) -> dict[str, Any]:
    return {
        "model": step.model,
        "type": step.type,
        "effects": [
            {
                "other": effect.other,
                "relation": effect.relation,
                "sentence": effect.sentence,
                "changes": {c.key: {"value": c.value, "low": c.low, "high": c.high} for c in effect.changes},
            }
            for effect in step.effects
        ],
    }

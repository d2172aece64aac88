"""results.json and summary.md: the comparison of all models."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

from trainers.contract import Diverged
from trainers.phases.evaluate.estimates import Estimate, difference, estimate
from trainers.phases.evaluate.metric import Metric


@dataclass
class Results:
    """Estimates by model and by `<benchmark>/<metric>`; both in the order of the spec."""

    seed: int
    models: Sequence[str]
    baseline: str | None
    metrics: dict[str, Metric]
    estimates: dict[str, dict[str, Estimate]]
    notes: dict[str, dict[str, str]]
    """Why a model has no figure: by model and benchmark, or `<benchmark>/<metric>`."""

    @classmethod
    def empty(cls, seed: int, models: Sequence[str], baseline: str | None) -> "Results":
        return cls(seed, models, baseline, {}, {model: {} for model in models}, {})

    def add(self, model: str, benchmark: str, metrics: Sequence[Metric], headline: bool) -> None:
        """Raises Diverged when a figure is not finite for no good reason."""
        for metric in metrics:
            key = f"{benchmark}/{metric.key}"
            found = estimate(metric, self.seed)
            whole = all(map(math.isfinite, chain(*metric.columns)))
            if whole and math.isfinite(found.value):
                self.metrics.setdefault(key, replace(metric, columns=(), headline=metric.headline and headline))
                self.estimates[model][key] = found
            elif whole and metric.undefined is not None:
                self.note(model, key, metric.undefined)
            else:
                raise Diverged(f"model {model!r}: {key} is {found.value if whole else 'made of what is no number'}")

    def note(self, model: str, benchmark: str, reason: str) -> None:
        self.notes.setdefault(model, {})[benchmark] = reason

    def document(self) -> dict[str, Any]:
        return {
            "models": list(self.models),
            "baseline": self.baseline,
            "metrics": [
                {
                    "key": key,
                    "label": metric.label,
                    "higherIsBetter": metric.higher_is_better,
                    "headline": metric.headline,
                    "proportion": metric.proportion,
                }
                for key, metric in self.metrics.items()
            ],
            "values": {m: {k: e.document() for k, e in found.items()} for m, found in self.estimates.items()},
            "differences": {key: self._differences(key) for key in self.metrics},
            "notes": self.notes,
        }

    def _differences(self, key: str) -> dict[str, dict[str, Any]]:
        """Paired differences of every model from every other: [model][other]."""
        having = [model for model in self.models if key in self.estimates[model]]
        return {
            a: {b: difference(self.estimates[a][key], self.estimates[b][key]) for b in having if b != a} for a in having
        }

    def flat(self) -> dict[str, float]:
        """Final metrics `<model>/<benchmark>/<metric>`, headlines first."""
        ordered = sorted(self.metrics, key=lambda key: not self.metrics[key].headline)
        return {
            f"{model}/{key}": self.estimates[model][key].value
            for key in ordered
            for model in self.models
            if key in self.estimates[model]
        }


def summary(results: Mapping[str, Any], latency: Mapping[str, Any]) -> str:
    """Markdown tables: headlines, everything else, latency; the best of each column in bold."""
    headline = [metric for metric in results["metrics"] if metric["headline"]]
    others = [metric for metric in results["metrics"] if not metric["headline"]]
    parts = ["# Evaluation", "Value [95 % interval over prompts]. ↑ higher is better, ↓ lower is better; best in bold."]
    parts += [table(results, metrics) for metrics in (headline, others) if metrics]
    if latency:
        parts += ["## Latency", latency_table(latency)]
    notes = [f"- {m}, {b}: {reason}" for m, found in results["notes"].items() for b, reason in found.items()]
    if notes:
        parts += ["## Left out", "\n".join(notes)]
    return "\n\n".join(parts) + "\n"


def table(results: Mapping[str, Any], metrics: Sequence[Mapping[str, Any]]) -> str:
    arrows = {True: " ↑", False: " ↓", None: ""}
    head = ["model", *(f"{m['key'].split('/')[0]}: {m['label']}{arrows[m['higherIsBetter']]}" for m in metrics)]
    best = {m["key"]: _best(results, m) for m in metrics}
    rows = [
        [model, *(_cell(results["values"][model].get(m["key"]), best[m["key"]]) for m in metrics)]
        for model in results["models"]
    ]
    return _markdown(head, rows)


def latency_table(latency: Mapping[str, Any]) -> str:
    head = [
        "model",
        "parameters",
        "prompt",
        "batch",
        "first token p50 / p95 / p99 (ms)",
        "per token p50 / p95 / p99 (ms)",
    ]
    rows = [
        [
            model,
            f"{found['parameters']:,}",
            str(point["promptLength"]),
            str(point["batchSize"]),
            *(_milliseconds(point[name]) for name in ("timeToFirstToken", "timePerOutputToken")),
            f"{point['tokensPerSecond']:,.0f}",
        ]
        for model, found in latency.items()
        for point in found["points"]
    ]
    return _markdown([*head, "tokens/s"], rows)


def number(value: float) -> str:
    return f"{value:.3f}" if abs(value) < 100 else f"{value:,.0f}"


def _milliseconds(summary: Mapping[str, float]) -> str:
    return " / ".join(f"{1000 * summary[name]:.2f}" for name in ("p50", "p95", "p99"))


def _best(results: Mapping[str, Any], metric: Mapping[str, Any]) -> float | None:
    values = [found[metric["key"]]["value"] for found in results["values"].values() if metric["key"] in found]
    if metric["higherIsBetter"] is None or len(set(values)) < 2:
        return None
    best: float = max(values) if metric["higherIsBetter"] else min(values)
    return best


def _cell(found: Mapping[str, Any] | None, best: float | None) -> str:
    if found is None:
        return "–"  # the notes say why
    value = number(found["value"])
    text = f"**{value}**" if found["value"] == best else value
    return text if found["low"] is None else f"{text} [{number(found['low'])}, {number(found['high'])}]"


def _markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)

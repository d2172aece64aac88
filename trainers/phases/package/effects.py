"""What each step did: a model beside the one it started from, metric by metric, with intervals. Computed, not told."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from trainers.phases.package.gather import Evaluation, Phase, Run


@dataclass(frozen=True)
class Change:
    """A paired difference between two models."""

    key: str
    label: str
    before: float
    after: float
    value: float
    low: float
    high: float
    higher_is_better: bool | None

    @property
    def verdict(self) -> str:
        """`better` or `worse` when the interval excludes 0, else `unclear`; `higher` or `lower` where neither is good."""
        if self.low <= 0 <= self.high:
            return "unclear"
        if self.higher_is_better is None:
            return "higher" if self.value > 0 else "lower"
        return "better" if (self.value > 0) == self.higher_is_better else "worse"


@dataclass(frozen=True)
class Effect:
    """A model against another one."""

    model: str
    other: str
    relation: str
    """What the other is to it: `its start`, `its teacher`, …"""
    changes: list[Change]

    @property
    def sentence(self) -> str:
        """What is clear and what is not, in words."""
        parts = [
            f"{word} on {', '.join(names)}"
            for word, verdict in (("better", "better"), ("worse", "worse"), ("no clear difference", "unclear"))
            if (names := [_named(change) for change in self.changes if change.verdict == verdict])
        ]
        return f"{'; '.join(parts) or 'nothing to compare'}."


def _named(change: Change) -> str:
    return change.label if change.verdict == "unclear" else f"{change.label} ({change.value:+.2f})".replace("-", "−")


@dataclass(frozen=True)
class Step:
    """A model and what its training changed."""

    model: str
    phase: str
    type: str
    effects: list[Effect]


def steps(run: Run, evaluation: Evaluation) -> list[Step]:
    """Every evaluated model of the run, in the evaluation's order."""
    by_label = {label: run.phases.get(name) for label, name in evaluation.phases.items()}
    found = []
    for model in evaluation.results["models"]:
        phase = by_label.get(model)
        if phase is not None:
            effects = [
                Effect(model, other, relation, changes(evaluation, model, other, headline=True))
                for other, relation in _others(run, evaluation, phase)
            ]
            found.append(Step(model, phase.name, phase.type, effects))
    return found


def _others(run: Run, evaluation: Evaluation, phase: Phase) -> Iterator[tuple[str, str]]:
    """Models worth comparing with, each once: where it started, its teacher, its peers, the baseline."""
    seen = {evaluation.label(phase.name)}
    for other, relation in _candidates(run, evaluation, phase):
        if other is not None and other not in seen and other in evaluation.results["models"]:
            seen.add(other)
            yield other, relation


def _candidates(run: Run, evaluation: Evaluation, phase: Phase) -> Iterator[tuple[str | None, str]]:
    chain = run.ancestors(phase)
    start = next((label for before in chain if (label := evaluation.label(before.name))), None)
    yield start, "its start"
    if (teacher := phase.built_on("teacher")) is not None:
        yield evaluation.label(teacher), "its teacher"
        for peer in _peers(run, phase, chain):
            yield evaluation.label(peer.name), "same start, no teacher"
    if chain:
        yield evaluation.results.get("baseline"), "the baseline"


def _peers(run: Run, phase: Phase, chain: Sequence[Phase]) -> Iterator[Phase]:
    """Models from the same first model that were fine-tuned instead: what a distilled student has to beat."""
    for other in run.phases.values():
        theirs = run.ancestors(other)
        same_start = bool(chain and theirs) and theirs[-1] is chain[-1] and run.size(other) == run.size(phase)
        if same_start and other.type == "sft" and other is not phase and other not in chain:
            yield other


def changes(evaluation: Evaluation, model: str, other: str, headline: bool) -> list[Change]:
    """Differences of all (headline) metrics that both models have, where better means something."""
    found = []
    for metric in evaluation.results["metrics"]:
        if headline and (not metric["headline"] or metric["higherIsBetter"] is None):
            continue
        change = _change(evaluation.results, metric, model, other)
        if change is not None:
            found.append(change)
    return found


def _change(results: Mapping[str, Any], metric: Mapping[str, Any], model: str, other: str) -> Change | None:
    key = metric["key"]
    difference = results.get("differences", {}).get(key, {}).get(model, {}).get(other) or {}
    if any(difference.get(part) is None for part in ("value", "low", "high")):
        return None
    before, after = (results["values"][name][key]["value"] for name in (other, model))
    bounds = difference["value"], difference["low"], difference["high"]
    return Change(key, metric_name(results, metric), before, after, *bounds, metric["higherIsBetter"])


def metric_name(results: Mapping[str, Any], metric: Mapping[str, Any]) -> str:
    """The metric's label, with its benchmark where several benchmarks of the same table measure the same."""
    table = [other["label"] for other in results["metrics"] if other["headline"] == metric["headline"]]
    return f"{metric['label']} ({benchmark_name(metric)})" if table.count(metric["label"]) > 1 else str(metric["label"])


def benchmark_name(metric: Mapping[str, Any]) -> str:
    return str(metric["key"]).split("/")[0]

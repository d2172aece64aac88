"""What each step did, in numbers and in words that the numbers bear out."""

from dataclasses import dataclass
from typing import Any

from trainers.phases.package.gather import Gathered


@dataclass(frozen=True)
class Change:
    label: str
    """Of the metric."""
    before: float
    after: float
    verdict: str
    """better, worse, or unclear: the 95 % intervals overlap."""


@dataclass(frozen=True)
class Step:
    model: str
    kind: str
    parent: str
    changes: list[Change]

    @property
    def sentence(self) -> str:
        """Only differences beyond the intervals are called better or worse."""
        parts = []
        for verdict in ("better", "worse"):
            named = [f"{c.label} ({number(c.before)} → {number(c.after)})" for c in self.changes if c.verdict == verdict]
            if named:
                parts.append(f"{verdict}: {', '.join(named)}")
        unclear = [c.label for c in self.changes if c.verdict == "unclear"]
        if unclear:
            parts.append(f"no difference beyond the intervals: {', '.join(unclear)}")
        return "; ".join(parts).capitalize() + "." if parts else "Nothing to compare."


def number(value: float) -> str:
    """Three significant digits, without exponents for ordinary sizes."""
    if value != value:
        return "n/a"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3g}"


def steps_of(gathered: Gathered, labels: dict[str, str]) -> list[Step]:
    """A step for every evaluated model whose parent was evaluated too. ``labels`` maps phases to shown names."""
    if gathered.evaluation is None:
        return []
    results = gathered.evaluation.results
    steps = []
    for phase in gathered.phases:
        child, parent = labels.get(phase.name), labels.get(phase.parent or "")
        if child in results["values"] and parent in results["values"]:
            steps.append(Step(child, phase.result.type, parent, _changes(results, parent, child)))
    return steps


def _changes(results: dict[str, Any], parent: str, child: str) -> list[Change]:
    changes = []
    for metric in results["metrics"]:
        before, after = (results["values"][name].get(metric["key"]) for name in (parent, child))
        if metric.get("headline") and metric.get("higherIsBetter") is not None and before and after:
            verdict = _verdict(before, after, metric["higherIsBetter"])
            changes.append(Change(metric["label"], before["value"], after["value"], verdict))
    return changes


def _verdict(before: dict[str, float], after: dict[str, float], higher_is_better: bool) -> str:
    if after.get("low", after["value"]) > before.get("high", before["value"]):
        return "better" if higher_is_better else "worse"
    if after.get("high", after["value"]) < before.get("low", before["value"]):
        return "worse" if higher_is_better else "better"
    return "unclear"

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
    """better, worse, or unclear: the 95 % interval of the paired difference includes 0."""


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
            named = [
                f"{c.label} ({number(c.before)} → {number(c.after)})" for c in self.changes if c.verdict == verdict
            ]
            if named:
                parts.append(f"{verdict}: {', '.join(named)}")
        unclear = [c.label for c in self.changes if c.verdict == "unclear"]
        if unclear:
            parts.append(f"no difference beyond the intervals: {', '.join(unclear)}")
        return "; ".join(parts).capitalize() + "." if parts else "Nothing to compare."


def number(value: float | None) -> str:
    """Three significant digits, without exponents for ordinary sizes."""
    if value is None:
        return "–"
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
        if metric["headline"] and metric["higherIsBetter"] is not None and before and after:
            paired = results["differences"][metric["key"]].get(child, {}).get(parent, {})
            verdict = _verdict(paired, metric["higherIsBetter"])
            changes.append(Change(metric_label(metric), before["value"], after["value"], verdict))
    return changes


def metric_label(metric: dict[str, Any]) -> str:
    """A metric's label with its benchmark, since two benchmarks may measure the same thing."""
    return f"{metric['key'].split('/')[0]}: {metric['label']}"


def _verdict(paired: dict[str, float | None], higher_is_better: bool) -> str:
    """By the 95 % interval of the paired difference, child minus parent."""
    low, high = paired.get("low"), paired.get("high")
    if low is None or high is None or low <= 0 <= high:
        return "unclear"
    return "better" if (low > 0) is higher_is_better else "worse"

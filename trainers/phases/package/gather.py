"""Everything that a run's phases left, read once."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trainers.contract import BadInput, PhaseDir, Result

PARENT_FIELDS = ("model", "policy", "student")
"""Spec fields that say which model a phase's model started from."""


@dataclass(frozen=True)
class Phase:
    name: str
    root: Path
    result: Result
    steps: list[dict[str, Any]]
    """Lines of metrics.jsonl."""

    @property
    def parent(self) -> str | None:
        """Name of the phase whose model this one started from; None for a model from elsewhere."""
        for name in PARENT_FIELDS:
            reference = self.result.settings.get(name)
            if isinstance(reference, dict):
                if reference.get("teacherLayers"):
                    reference = self.result.settings["teacher"]
                found = reference.get("phase")
                return str(found) if found else None
        return None

    def artifact(self, kind: str) -> Path | None:
        for artifact in self.result.artifacts.values():
            if artifact.kind == kind:
                return self.root / artifact.path
        return None


@dataclass(frozen=True)
class Evaluation:
    results: dict[str, Any]
    latency: dict[str, Any]
    responses: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    """Rows by model label."""


@dataclass(frozen=True)
class Gathered:
    run: str
    phases: list[Phase]
    evaluation: Evaluation | None

    def phase(self, name: str) -> Phase | None:
        return next((phase for phase in self.phases if phase.name == name), None)


def gather(run: str, inputs: Mapping[str, Path]) -> Gathered:
    """Read all inputs, ordered so that each phase comes after those it builds on. Raises BadInput if one has no result."""
    phases = _in_order([_phase(name, root) for name, root in inputs.items()])
    evaluations = [phase for phase in phases if phase.result.type == "evaluate"]
    return Gathered(run, phases, _evaluation(evaluations[-1].root) if evaluations else None)


def _phase(name: str, root: Path) -> Phase:
    directory = PhaseDir(root)
    result = directory.read_result()
    if result is None:
        raise BadInput(f"phase {name!r} has no result.json in {root}: it has not finished")
    return Phase(name, root, result, _jsonl(directory.metrics))


def _in_order(phases: list[Phase]) -> list[Phase]:
    """Topological order; among equals, by when they started."""
    waiting = sorted(phases, key=lambda phase: (phase.result.started_at, phase.name))
    ordered: list[Phase] = []
    while waiting:
        done = {phase.name for phase in ordered}
        names = {phase.name for phase in waiting}
        ready = next(phase for phase in waiting if not (set(phase.result.inputs) & names) - done)
        ordered.append(ready)
        waiting.remove(ready)
    return ordered


def _evaluation(root: Path) -> Evaluation:
    results = json.loads((root / "results.json").read_text())
    path = root / "latency.json"
    latency = json.loads(path.read_text()) if path.exists() else {}
    responses = {label: _jsonl(root / "responses" / f"{label}.jsonl") for label in results["models"]}
    return Evaluation(results, latency, {label: rows for label, rows in responses.items() if rows})


def _jsonl(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines() if line.strip()]

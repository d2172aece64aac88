"""Everything that the run's phases left, read once."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trainers import json_text, jsonl
from trainers.contract import BadInput, Result
from trainers.core.context import PhaseContext
from trainers.phase_dir import PhaseDir
from trainers.phases.package.spec import PackageSpec
from trainers.spec import NamedModel, shown_labels

STARTS = ("policy", "student", "model")
"""Roles of the model that a phase starts from."""


@dataclass(frozen=True)
class Edge:
    role: str
    """Path of the reference in the phase's settings: `policy`, `rewardModel`, `models[0]`."""
    phase: str


@dataclass(frozen=True)
class Phase:
    name: str
    root: Path
    result: Result
    lines: list[dict[str, Any]]
    """metrics.jsonl."""
    edges: tuple[Edge, ...]

    @property
    def type(self) -> str:
        return self.result.type

    def built_on(self, *roles: str) -> str | None:
        """The phase that is referred to in the first of these roles that names one."""
        found = {edge.role: edge.phase for edge in self.edges}
        return next((found[role] for role in roles if role in found), None)

    def artifact(self, kind: str) -> Path | None:
        return next((self.root / a.path for a in self.result.artifacts.values() if a.kind == kind), None)


@dataclass(frozen=True)
class Model:
    label: str
    phase: Phase
    path: Path


@dataclass(frozen=True)
class Evaluation:
    phase: Phase
    results: Mapping[str, Any]
    latency: Mapping[str, Any]
    responses: Mapping[str, list[dict[str, Any]]]
    phases: Mapping[str, str]
    """Label in this evaluation to the phase that left the model."""

    def label(self, phase: str) -> str | None:
        """What this evaluation calls the model of a phase."""
        return next((label for label, name in self.phases.items() if name == phase), None)


@dataclass(frozen=True)
class Run:
    name: str
    seed: int
    phases: Mapping[str, Phase]
    """In the run's order, inputs first."""
    models: list[Model]
    reward_models: list[Model]
    evaluations: list[Evaluation] = field(default_factory=list)

    def start_of(self, phase: Phase) -> Phase | None:
        """The phase whose model this one starts from."""
        # A student made of its teacher's layers starts from the teacher.
        student = phase.result.settings.get("student") or {}
        roles = ("teacher",) if student.get("teacherLayers") else STARTS
        return self.phases.get(phase.built_on(*roles) or "")

    def ancestors(self, phase: Phase) -> list[Phase]:
        """The chain of starts, nearest first."""
        chain: list[Phase] = []
        while (before := self.start_of(phase)) is not None and before not in chain:
            chain.append(before)
            phase = before
        return chain

    def size(self, phase: Phase) -> float | None:
        """Parameters of the model that a phase left."""
        return phase.result.metrics.get("parameters")


def gather(ctx: PhaseContext, spec: PackageSpec) -> Run:
    phases = {name: _phase(name, ctx.input_dir(name)) for name in ctx.file.inputs}
    phases = {phase.name: phase for phase in _inputs_first(phases)}
    return Run(
        ctx.file.run,
        ctx.seed,
        phases,
        _models(spec, phases),
        [Model(p.name, p, path) for p in phases.values() if (path := p.artifact("reward-model"))],
        [_evaluation(phase) for phase in phases.values() if phase.artifact("evaluation")],
    )


def _phase(name: str, directory: PhaseDir) -> Phase:
    result = directory.read_result()
    if result is None:
        raise BadInput(f"phase {name!r} has no result.json in {directory.root}: it has not finished")
    edges = tuple(Edge(*found) for found in references(result.settings))
    return Phase(name, directory.root, result, read_jsonl(directory.metrics), edges)


def references(settings: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """Every `{phase: NAME}` in a phase's settings, with its path."""
    if isinstance(settings, list):
        for i, item in enumerate(settings):
            yield from references(item, f"{path}[{i}]")
    elif isinstance(settings, dict):
        if isinstance(settings.get("phase"), str):
            yield path, settings["phase"]
        for key, value in settings.items():
            yield from references(value, f"{path}.{key}" if path else key)


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Rows of a file that may not exist; a torn last line is left out."""
    return list(jsonl.read_whole_lines(path)) if path.exists() else []


def _inputs_first(phases: Mapping[str, Phase]) -> list[Phase]:
    """Topological, and in the order of their start beside that."""
    ordered: list[Phase] = []
    waiting = sorted(phases.values(), key=lambda phase: phase.result.started_at)
    while waiting:
        done = {phase.name for phase in ordered}
        ready = next((p for p in waiting if all(e.phase in done or e.phase not in phases for e in p.edges)), waiting[0])
        ordered.append(ready)
        waiting.remove(ready)
    return ordered


def _models(spec: PackageSpec, phases: Mapping[str, Phase]) -> list[Model]:
    refs = spec.models or tuple(NamedModel(phase=p.name) for p in phases.values() if p.artifact("model"))
    found = []
    for label, ref in zip(shown_labels(refs), refs, strict=True):
        if ref.phase is None:  # a model from elsewhere is not ours to hand on
            continue
        path = phases[ref.phase].artifact("model") if ref.phase in phases else None
        if path is None:
            raise BadInput(f"models: phase {ref.phase!r} leaves no model")
        found.append(Model(label, phases[ref.phase], path))
    return found


def _document(path: Path) -> Any:
    """A file that an evaluation wrote. Raises BadInput for what is no JSON; a figure that is no number is none."""
    try:
        return json_text.parse(path.read_bytes())
    except json_text.Malformed as problem:
        raise BadInput(f"{path}: {problem}; run the evaluation again") from problem


def _evaluation(phase: Phase) -> Evaluation:
    results = _document(phase.root / "results.json")
    latency = phase.root / "latency.json"
    named = [NamedModel.model_validate(item) for item in phase.result.settings.get("models", [])]
    # Without a list it compared everything it was given, under the phases' names.
    phases = {ref.label: ref.phase for ref in named if ref.phase} if named else {n: n for n in results["models"]}
    return Evaluation(
        phase,
        results,
        _document(latency) if latency.exists() else {},
        {label: read_jsonl(phase.root / "responses" / f"{label}.jsonl") for label in results["models"]},
        phases,
    )

"""What only the run as a whole can tell: references, kinds of artifacts, loops, tokenizers."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

from pydantic import ValidationError

from controller.api.problems import Problem, nearest
from controller.api.quantities import byte_count
from controller.api.run import AlignmentRun, PhaseEntry
from controller.api.volumes import mount_problems
from controller.plan.adapted import adapter_problems
from controller.plan.foreign import profile_problems
from controller.plan.graph import cycle, edges
from controller.plan.once import of_spec
from controller.plan.pods import pod_problems, settings_problems
from controller.plan.resolve import merge_templates, resolve
from controller.plan.room import room_problems
from controller.plan.tokenizers import tokenizer_problems
from trainers.contract import PhaseType
from trainers.spec import ArtifactRef

SHOWN_METRICS = 12

GPU = "nvidia.com/gpu"
LEAST_GPU = 2**30
"""Bytes."""


@of_spec
def check_run(run: AlignmentRun) -> list[Problem]:
    """Every problem of the run as a whole."""
    types = {entry.name: entry.type for entry in run.phases}
    problems = [*_model_problems(run), *check_entries(run.phases, types)]
    if not problems:
        problems += [*tokenizer_problems(run), *_gate_problems(run), *_node_problems(run), *_process_problems(run)]
        problems += [*_inherited_problems(run), *_share_problems(run), *room_problems(run, {})]
        problems += [*adapter_problems(run, {}), *settings_problems(run), *profile_problems(run)]
    return [*problems, *_gpu_problems(run), *_mount_problems(run), *pod_problems(run)]


def check_entries(entries: Sequence[PhaseEntry], types: Mapping[str, PhaseType | None]) -> list[Problem]:
    """Problems between phases. ``types`` also has phases that could not be read; their type may be unknown."""
    problems = [*_duplicates(entries)]
    for entry in entries:
        for path, ref in entry.spec.references():
            problems += _reference_problems(entry, f"spec.phases[{entry.name}].{entry.type.name}.{path}", ref, types)
    unique = list({entry.name: entry for entry in entries}.values())
    if not problems and (loop := cycle(edges(unique))):
        problems.append(Problem("spec.phases", f"these phases wait for each other: {' -> '.join(loop)}"))
    return problems


def _model_problems(run: AlignmentRun) -> Iterator[Problem]:
    model = run.spec.model
    if model is not None and model.phase is not None:
        yield Problem(
            "spec.model.phase",
            f'"{model.phase}": the run\'s own model is a source or scratch; name phases in the phases',
        )
    for entry in run.phases:
        if model is None and "model" in type(entry.spec).model_fields and getattr(entry.spec, "model") is None:  # noqa: B009
            path = f"spec.phases[{entry.name}].{entry.type.name}.model"
            yield Problem(path, "is not set, and spec.model, which would stand in for it, is not set either")


def _inherited_problems(run: AlignmentRun) -> Iterator[Problem]:
    """A phase's own settings were looked at alone; some do not go with the model that the run says for it."""
    own = {entry.name: entry.spec for entry in run.phases}
    for phase in resolve(run):
        if getattr(own[phase.name], "model", None) is getattr(phase.spec, "model", None):
            continue
        try:
            type(phase.spec).model_validate(phase.spec.document(exclude_unset=True))
        except ValidationError as error:
            for found in error.errors():
                path = ".".join([f"spec.phases[{phase.name}].{phase.type.name}", *map(str, found["loc"])])
                yield Problem(path, found["msg"].removeprefix("Value error, "))


def _gate_problems(run: AlignmentRun) -> Iterator[Problem]:
    """Gates on metrics that their phase cannot have: they would fail after all the training."""
    for phase in resolve(run):
        known = phase.spec.final_metrics()
        for i, gate in enumerate(phase.spec.gates):
            if gate.metric not in known:
                path = f"spec.phases[{phase.name}].{phase.type.name}.gates[{i}].metric"
                yield Problem(path, f'"{gate.metric}" is no metric of this phase; {_listed(gate.metric, known)}')


def _node_problems(run: AlignmentRun) -> Iterator[Problem]:
    """A phase of fewer nodes than the run's least needs them all, which is no mistake."""
    ours = run.spec.template
    own = [(f"spec.phases[{e.name}]", e.template) for e in run.phases if e.template and e.template.min_nodes]
    for path, template in [("spec", ours), *((path, merge_templates(ours, template)) for path, template in own)]:
        if (template.min_nodes or 0) > (template.nodes or 1):
            yield Problem(
                f"{path}.template.minNodes", f"{template.min_nodes} is more than nodes, {template.nodes or 1}"
            )


def _process_problems(run: AlignmentRun) -> Iterator[Problem]:
    for phase in resolve(run):
        parallel, processes = getattr(phase.spec, "parallel", None), phase.nodes * phase.procs_per_node
        if parallel is not None and parallel.strategy == "single" and processes > 1:
            path = f"spec.phases[{phase.name}].{phase.type.name}.parallel.strategy"
            yield Problem(
                path, f"single is one process, and the template asks for {processes}: set ddp, fsdp or deepspeed"
            )


def _gpu_problems(run: AlignmentRun) -> Iterator[Problem]:
    """A number without its unit is of bytes, and every phase would be said not to fit."""
    own = [(f"spec.phases[{entry.name}]", entry.template) for entry in run.phases if entry.template]
    for path, template in [("spec", run.spec.template), *own]:
        if template.gpu_memory is not None and byte_count(template.gpu_memory) < LEAST_GPU:
            said = f'"{template.gpu_memory}" is less than any GPU has; with its unit: 80Gi'
            yield Problem(f"{path}.template.gpuMemory", said)


def _share_problems(run: AlignmentRun) -> Iterator[Problem]:
    for phase in resolve(run):
        limits = phase.template.resources.limits if phase.template.resources else {}
        if GPU in limits and phase.procs_per_node > byte_count(limits[GPU]):
            said = (
                f"{phase.procs_per_node} processes on {limits[GPU]} GPU (resources.limits): each takes one of its own"
            )
            yield Problem(f"spec.phases[{phase.name}].template.procsPerNode", said)


def _mount_problems(run: AlignmentRun) -> Iterator[Problem]:
    """Pods would be refused when they are made, and nobody told but by an event."""
    ours = run.spec.template
    own = [(f"spec.phases[{e.name}]", e.template) for e in run.phases if e.template]
    mounting = [(path, merge_templates(ours, t)) for path, t in own if t.model_fields_set & {"claims", "volumes"}]
    claimed = run.spec.workspace is not None and run.spec.workspace.claim_name is not None
    for path, template in [("spec", ours), *mounting]:
        for problem in mount_problems(template.claims, template.volumes or (), claimed):
            yield Problem(f"{path}.template.volumes" if template.volumes else f"{path}.template.claims", problem)


def _listed(metric: str, known: Sequence[str]) -> str:
    shown = known if len(known) <= SHOWN_METRICS else [*known[:SHOWN_METRICS], f"and {len(known) - SHOWN_METRICS} more"]
    return f"metrics are: {', '.join(shown)}{nearest(metric, known)}"


def _duplicates(entries: Sequence[PhaseEntry]) -> Iterator[Problem]:
    for name, count in Counter(entry.name for entry in entries).items():
        if count > 1:
            yield Problem(
                f"spec.phases[{name}].name", f'"{name}" is the name of {count} phases; names are unique in a run'
            )


def _reference_problems(
    entry: PhaseEntry, path: str, ref: ArtifactRef, types: Mapping[str, PhaseType | None]
) -> Iterator[Problem]:
    name = ref.phase
    if name is None:
        return
    if name == entry.name:
        yield Problem(f"{path}.phase", f'"{name}" is this phase itself')
    elif name not in types:
        others = [other for other in types if other != entry.name]
        listed = f"phases are: {', '.join(others)}" if others else "it has no other"
        yield Problem(f"{path}.phase", f'"{name}" is not a phase of this run; {listed}{nearest(name, others)}')
    elif (kind := types[name]) is not None and ref.accepts and kind.produces not in ref.accepts:
        wanted = " or ".join(ref.accepts)
        fitting = [n for n, t in types.items() if t and t.produces in ref.accepts and n != entry.name]
        offer = f"; phases that leave one: {', '.join(fitting)}" if fitting else ""
        yield Problem(
            f"{path}.phase", f'"{name}" is of type {kind.name} and leaves a {kind.produces}, not a {wanted}{offer}'
        )

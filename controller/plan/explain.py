"""What a run would do now, phase by phase, and why."""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import ValidationError

from controller.api.run import AlignmentRun
from controller.plan.graph import dependents, edges
from controller.plan.observed import Observed, ObservedResult, Unfinished
from controller.plan.resolve import ResolvedPhase, resolve
from trainers import gates
from trainers.spec import PhaseSpec, identifying

SHOWN_CHANGES = 4


@dataclass(frozen=True)
class PhasePlan:
    name: str
    type: str
    action: Literal["reuse", "run", "continue", "skip"]
    why: str
    artifact_digest: str | None = None
    """Known for what is reused."""


def explain(run: AlignmentRun, observed: Observed, only: Collection[str] | None = None) -> tuple[PhasePlan, ...]:
    """Plans in the order in which phases can run. The run has been checked."""
    plans: dict[str, PhasePlan] = {}
    for phase in resolve(run):
        before = run.status.phase_status(phase.name) if run.status else None
        plan = _explain(phase, observed, plans, (before.again or 0) if before else 0)
        skipped = only is not None and phase.name not in only and plan.action != "reuse"
        plans[phase.name] = (
            PhasePlan(phase.name, phase.type.name, "skip", f"not selected ({plan.why})") if skipped else plan
        )
    return tuple(plans.values())


def _explain(phase: ResolvedPhase, observed: Observed, plans: Mapping[str, PhasePlan], again: int) -> PhasePlan:
    before = observed.results.get(phase.name)
    artifacts = {name: plans[name].artifact_digest for name in phase.inputs}
    known = {name: digest for name, digest in artifacts.items() if digest is not None}
    if len(known) < len(artifacts):
        return PhasePlan(phase.name, phase.type.name, "run", _inputs_change(phase, plans, before))
    digest = phase.digest(known, again)
    left = observed.unfinished.get(phase.name)
    left = left if left is not None and left.digest == digest else None
    return (
        _reuse(phase, before, observed.elsewhere.get(digest), digest)
        or _continue(phase, left)
        or PhasePlan(phase.name, phase.type.name, "run", _why_run(phase, before, left, known, digest, again))
    )


def _reuse(
    phase: ResolvedPhase, before: ObservedResult | None, other: ObservedResult | None, digest: str
) -> PhasePlan | None:
    """A result that stands; dependents can build on it if it meets the gates."""
    here = before is not None and before.digest == digest
    if before is not None and here and before.stale is None:
        found, why = before, "finished, nothing changed"
    elif other is not None and other is not before and not here:
        found, why = other, f"finished with these settings in {other.place}"
    else:
        return None
    missed = gates.missed(phase.spec.gates, found.metrics)
    return PhasePlan(
        phase.name, phase.type.name, "reuse", f"{why}; {missed}" if missed else why,
        None if missed else found.artifact_digest,
    )  # fmt: skip


def _continue(phase: ResolvedPhase, left: Unfinished | None) -> PhasePlan | None:
    if left is None or left.stale is not None:
        return None
    why = f"from the checkpoint of step {left.step}" if left.step else "was interrupted before its first checkpoint"
    return PhasePlan(phase.name, phase.type.name, "continue", why)


def _why_run(
    phase: ResolvedPhase, before: ObservedResult | None, left: Unfinished | None, inputs: Mapping[str, str], digest: str,
    again: int,
) -> str:  # fmt: skip
    if before is not None:
        return _changes(phase, before, inputs, digest) or (
            "asked to run anew" if again else "image or version of the program changed"
        )
    return f"begins again: {left.stale}" if left is not None and left.stale is not None else "not run yet"


def _inputs_change(phase: ResolvedPhase, plans: Mapping[str, PhasePlan], before: ObservedResult | None) -> str:
    pending = [name for name in phase.inputs if plans[name].artifact_digest is None]
    if before is None:
        return "not run yet"
    refused = [name for name in pending if plans[name].action == "reuse"]
    return f"input {refused[0]} misses its gates" if refused else f"input {', '.join(pending)} changes"


def _changes(phase: ResolvedPhase, before: ObservedResult, inputs: Mapping[str, str], digest: str) -> str:
    if before.digest == digest:
        return before.stale or "its result does not hold any more"
    found = [*_changed_settings(phase.spec, before.settings)]
    found += [f"input {name} changed" for name, mark in inputs.items() if before.inputs.get(name, mark) != mark]
    found += [f"input {name} is new" for name in inputs if name not in before.inputs]
    found += [f"input {name} is gone" for name in before.inputs if name not in inputs]
    more = f", and {len(found) - SHOWN_CHANGES} more" if len(found) > SHOWN_CHANGES else ""
    return ", ".join(found[:SHOWN_CHANGES]) + more


def _changed_settings(spec: PhaseSpec, before: Mapping[str, Any]) -> Iterator[str]:
    """`beta 0.1 -> 0.2` for each setting that counts."""
    try:
        # Read by today's model, so that options which did not exist then have their defaults.
        old = dict(_flat(_identity(type(spec).model_validate(before))))
    except ValidationError:
        yield "its settings were those of another version"
        return
    new = dict(_flat(_identity(spec)))
    for path in [*new, *(p for p in old if p not in new)]:
        if old.get(path) != new.get(path):
            yield f"{path} {_shown(old.get(path))} -> {_shown(new.get(path))}"


def _identity(spec: PhaseSpec) -> dict[str, Any]:
    return identifying(spec).document()


def _flat(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict) and value:
        for key, item in value.items():
            yield from _flat(item, f"{path}.{key}" if path else str(key))
    elif isinstance(value, list) and value:
        for i, item in enumerate(value):
            yield from _flat(item, f"{path}[{i}]")
    else:
        yield path, value


def _shown(value: object) -> str:
    text = "unset" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
    return text if len(text) <= 40 else text[:37] + "..."


# ---------------------------------------------------------------- selections


def select(run: AlignmentRun, only: Collection[str], start: Collection[str]) -> frozenset[str] | None:
    """Phases meant by `--only` and `--from`; None is all of them. Raises ValueError for a name that is not a phase."""
    names = [entry.name for entry in run.phases]
    for name in (*only, *start):
        if name not in names:
            raise ValueError(f'"{name}" is not a phase of this run; phases are: {", ".join(names)}')
    if not only and not start:
        return None
    return frozenset({*only, *start, *dependents(edges(run.phases), start)})


def unmet_inputs(run: AlignmentRun, plans: Collection[PhasePlan], only: Collection[str]) -> list[str]:
    """One line for each phase outside the selection that the selection needs and that has not finished."""
    needed: dict[str, list[str]] = {}
    for name, inputs in edges(run.phases).items():
        for other in inputs if name in only else ():
            needed.setdefault(other, []).append(name)
    return [
        f"phase {plan.name}, which {', '.join(needed[plan.name])} {'needs' if len(needed[plan.name]) == 1 else 'need'}, "
        f"is not selected and has not finished: {plan.why.removeprefix('not selected (').removesuffix(')')}"
        for plan in plans
        if plan.name in needed and plan.name not in only and plan.action != "reuse"
    ]

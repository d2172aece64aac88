"""How much of a cluster a run can take at once, and whether that is more than an admin lets it.

Phases that build on each other never run side by side, so what counts is the heaviest set of phases of which none builds on
another. Among chains of any shape that is no sum over a list: by Dilworth's theorem with weights it is what is left of all
weights when as much as possible of each phase's is matched with those of phases after it, which is a flow.
"""

from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping
from math import ceil

from controller.api.problems import Problem
from controller.api.quantities import number
from controller.api.run import AlignmentRun
from controller.api.status import Attempt, PhaseStatus
from controller.plan.graph import Edges, dependents
from controller.plan.once import of_spec
from controller.plan.resolve import ResolvedPhase, resolve

NODES = "nodes"
MOST = 10**15
"""Of one resource: a number that JSON keeps."""

Weights = Mapping[str, int]
"""By phase."""
AtOnce = tuple[int, tuple[str, ...]]
"""How much, and which phases take it."""


def size_problems(run: AlignmentRun, most: Mapping[str, int]) -> Iterator[Problem]:
    """``most``: of `nodes`, or of a device by the name of its resource. The run has been checked."""
    for what, limit in most.items():
        amount, phases = (_at_once(run).get(what)) or (0, ())
        if amount > limit:
            said = f"{', '.join(phases)} may run at once, with {amount:,} {what} in all" if len(phases) > 1 else ""
            said = said or f"{phases[0]} takes {amount:,} {what}"
            yield Problem("spec.phases", f"{said}; a run in this namespace takes at most {limit:,} at once")


@of_spec
def _at_once(run: AlignmentRun) -> dict[str, AtOnce]:
    """By what is taken. Phases that are suspended take nothing."""
    phases = resolve(run)
    taken = {phase.name: {} if phase.suspend else dict(_taken(phase)) for phase in phases}
    graph = {phase.name: phase.inputs for phase in phases}
    kinds = {what for amounts in taken.values() for what in amounts}
    return {what: heaviest({name: taken[name].get(what, 0) for name in taken}, graph) for what in kinds}


def _taken(phase: ResolvedPhase) -> Iterator[tuple[str, int]]:
    yield NODES, phase.nodes
    yield from devices_of(phase, phase.nodes).items()


def devices_of(phase: ResolvedPhase, nodes: int) -> dict[str, int]:
    """What its pods take beside their number, by the name of the resource."""
    template, devices = phase.template, dict[str, int]()
    containers = [template.resources]
    if template.server is not None and phase.spec.starts_server:
        containers.append(template.server.resources)
    for resources in filter(None, containers):
        for name, quantity in {**resources.requests, **resources.limits}.items():
            devices[name] = min(devices.get(name, 0) + ceil(number(quantity)) * nodes, MOST)
    return devices


# ---------------------------------------------------------------- what goes on


def taken_by(statuses: Iterable[PhaseStatus], phases: Iterable[ResolvedPhase]) -> Counter[str]:
    """By attempts that have not ended: a phase that was edited, suspended or taken out of the run has till then what it had."""
    known, found = {phase.name: phase for phase in phases}, Counter[str]()
    for status in statuses:
        for attempt in status.attempts:
            if not attempt.state.ended:
                found.update(_of_attempt(attempt, known.get(status.name)))
    return found


def _of_attempt(attempt: Attempt, phase: ResolvedPhase | None) -> dict[str, int]:
    """One of an earlier version has not said so."""
    nodes = attempt.nodes or (phase.nodes if phase else 1)
    return {NODES: nodes, **(attempt.takes or (devices_of(phase, nodes) if phase else {}))}


def too_much(record: Attempt, taken: Mapping[str, int], most: Mapping[str, int]) -> str:
    """Why an attempt may not begin yet beside what is ``taken``; empty if it may, as alone it always may: the run was checked."""
    wanted = {NODES: record.nodes, **record.takes}
    for what, limit in most.items():
        if (wanted.get(what) or 0) > 0 and taken.get(what, 0) + wanted[what] > limit:
            still = f"{taken.get(what, 0):,} {what} are still taken by attempts that have not ended"
            return f"waits: {still}, and a run in this namespace takes at most {limit:,} at once"
    return ""


def heaviest(weights: Weights, graph: Edges) -> AtOnce:
    """The heaviest set of which no member builds on another, in the order of ``weights``."""
    after = {name: dependents(graph, [name]) for name in weights}
    left, right = dict(weights), dict(weights)
    sent: dict[str, dict[str, int]] = {name: {} for name in weights}
    while (way := _way(left, right, sent, after)) is not None:
        _send(way, left, right, sent)
    befores, afters = _reached(left, sent, after)
    chosen = tuple(name for name in weights if name in befores and name not in afters and weights[name])
    return sum(weights[name] for name in chosen), chosen


def _way(
    left: Weights, right: Weights, sent: Mapping[str, Weights], after: Mapping[str, Iterable[str]]
) -> list[str] | None:
    """A shortest way along which more can be sent: a phase, one after it, one that has sent to that, one after this, ..."""
    ways = deque([name] for name, rest in left.items() if rest)
    seen_before, seen_after = {way[0] for way in ways}, set[str]()
    while ways:
        way = ways.popleft()
        for end in (name for name in after[way[-1]] if name not in seen_after):
            if right[end]:
                return [*way, end]
            seen_after.add(end)
            back = [name for name, to in sent.items() if to.get(end) and name not in seen_before]
            seen_before.update(back)
            ways.extend([*way, end, name] for name in back)
    return None


def _send(way: list[str], left: dict[str, int], right: dict[str, int], sent: dict[str, dict[str, int]]) -> None:
    """As much as goes."""
    forth = list(zip(way[::2], way[1::2], strict=True))
    back = list(zip(way[2::2], way[1::2], strict=False))
    amount = min(left[way[0]], right[way[-1]], *(sent[one][end] for one, end in back))
    for one, end in forth:
        sent[one][end] = sent[one].get(end, 0) + amount
    for one, end in back:
        sent[one][end] -= amount
    left[way[0]] -= amount
    right[way[-1]] -= amount


def _reached(
    left: Weights, sent: Mapping[str, Weights], after: Mapping[str, Iterable[str]]
) -> tuple[set[str], set[str]]:
    """From what could not be sent: phases as those before, and as those after."""
    befores, afters = {name for name, rest in left.items() if rest}, set[str]()
    waiting = list(befores)
    while waiting:
        for end in (name for name in after[waiting.pop()] if name not in afters):
            afters.add(end)
            back = [name for name, to in sent.items() if to.get(end) and name not in befores]
            befores.update(back)
            waiting += back
    return befores, afters

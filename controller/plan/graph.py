"""Which phase builds on which."""

from collections.abc import Iterable, Mapping, Sequence

from controller.api.run import PhaseEntry

Edges = Mapping[str, tuple[str, ...]]
"""Phase name to the names it builds on directly, in the run's order."""


def edges(entries: Sequence[PhaseEntry]) -> Edges:
    """Every phase with its inputs. References to phases that do not exist are left out: :mod:`controller.plan.check` tells."""
    direct = _with_default_models(entries, explicit(entries))
    return _with_readers_of_all(entries, direct)


def explicit(entries: Sequence[PhaseEntry]) -> dict[str, tuple[str, ...]]:
    """References that are written in the run."""
    names = [entry.name for entry in entries]
    found = {entry.name: {ref.phase for _, ref in entry.spec.references() if ref.phase} for entry in entries}
    return {name: tuple(other for other in names if other in refs) for name, refs in found.items()}


def wants_all_models(entry: PhaseEntry) -> bool:
    """Phases with an empty `models` list compare every model of the run."""
    return getattr(entry.spec, "models", None) == ()


def models_for(entry: PhaseEntry, entries: Sequence[PhaseEntry], direct: Edges) -> tuple[str, ...]:
    """Phases that leave a model and do not build on ``entry``, in the run's order."""
    after = dependents(direct, [entry.name])
    return tuple(e.name for e in entries if e.type.produces == "model" and e.name not in after and e.name != entry.name)


def _with_default_models(entries: Sequence[PhaseEntry], direct: Edges) -> dict[str, tuple[str, ...]]:
    names = [entry.name for entry in entries]
    merged = dict(direct)
    for entry in entries:
        if wants_all_models(entry):
            inputs = {*direct[entry.name], *models_for(entry, entries, direct)}
            merged[entry.name] = tuple(name for name in names if name in inputs)
    return merged


def _with_readers_of_all(entries: Sequence[PhaseEntry], direct: Edges) -> dict[str, tuple[str, ...]]:
    """Types that read all build on every phase that does not build on them; two such phases ignore each other."""
    merged = dict(direct)
    for entry in entries:
        if entry.type.reads_all:
            after = {entry.name, *dependents(direct, [entry.name])}
            merged[entry.name] = tuple(
                e.name
                for e in entries
                if e.name not in after and (not e.type.reads_all or e.name in direct[entry.name])
            )
    return merged


def dependents(graph: Edges, names: Iterable[str]) -> frozenset[str]:
    """Everything that builds on these, directly or not."""
    found: set[str] = set()
    queue = list(names)
    while queue:
        name = queue.pop()
        new = [other for other, inputs in graph.items() if name in inputs and other not in found]
        found.update(new)
        queue += new
    return frozenset(found)


def topological(graph: Edges) -> tuple[str, ...]:
    """Inputs before what builds on them, otherwise in the run's order. Phases on a cycle are left out."""
    done: list[str] = []
    waiting = list(graph)
    while ready := [name for name in waiting if all(i in done for i in graph[name])]:
        done.append(ready[0])
        waiting.remove(ready[0])
    return tuple(done)


def cycle(graph: Edges) -> tuple[str, ...] | None:
    """One loop, its first phase repeated at the end: `a, b, a`. None if there is none."""
    left = [name for name in graph if name not in topological(graph)]
    if not left:
        return None
    # Going back along inputs inside what is left must meet a phase twice.
    path = [left[0]]
    while path.count(path[-1]) == 1:
        path.append(next(i for i in graph[path[-1]] if i in left))
    loop = path[path.index(path[-1]) :]
    return tuple(reversed(loop))

"""From a run to phases with nothing left open: the run's model and seed filled in, templates merged, inputs named."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from controller.api.run import AlignmentRun, PhaseEntry
from controller.api.template import Template
from controller.plan import graph
from controller.plan.once import of_spec
from trainers.contract import PhaseType, canonical_json, phase_digest, sha256_text
from trainers.spec import NamedModel, PhaseSpec


@dataclass(frozen=True)
class ResolvedPhase:
    name: str
    type: PhaseType
    spec: PhaseSpec
    inputs: tuple[str, ...]
    template: Template
    suspend: bool
    _marks: dict[tuple[object, ...], str] = field(default_factory=dict, compare=False, repr=False)

    @property
    def image(self) -> str:
        return self.template.image or ""

    @cached_property
    def settings(self) -> str:
        """Mark of everything that an attempt is started with, whether or not it can change the result.

        As it is written: a release that adds an option changes no mark.
        """
        written = [model.document(exclude_unset=True) for model in (self.spec, self.template)]
        return sha256_text(canonical_json(written))[:16]

    def asked(self, inputs: Mapping[str, str], again: int = 0) -> str:
        """Mark of what is asked for, word by word, nulls included, and of what it builds on (artifact digests)."""
        return self._once("asked", inputs, again, self._asked)

    def digest(self, inputs: Mapping[str, str], again: int = 0) -> str:
        """Its identity, given what it builds on (artifact digests).

        ``again``: number of the request to run anew. With an identity of its own the phase finds nothing that had been computed
        before, sets that aside, and goes on from its own checkpoints: trainers of any version do so without knowing why.
        """
        return self._once("digest", inputs, again, self._digest)

    def _asked(self, inputs: Mapping[str, str], again: int) -> str:
        spec = self.spec.model_dump(by_alias=True, mode="json", exclude_unset=True)
        said = [self.type.name, spec, self.image, dict(inputs), *([again] if again else [])]
        return sha256_text(canonical_json(said))[:16]

    def _digest(self, inputs: Mapping[str, str], again: int) -> str:
        first = phase_digest(self.type.name, self.spec, self.image, inputs)
        return sha256_text(canonical_json([first, again])) if again else first

    def _once(
        self, what: str, inputs: Mapping[str, str], again: int, work: Callable[[Mapping[str, str], int], str]
    ) -> str:
        key = (what, again, *inputs.items())
        if key not in self._marks:
            self._marks[key] = work(inputs, again)
        return self._marks[key]

    @property
    def nodes(self) -> int:
        return self.template.nodes or 1

    @property
    def min_nodes(self) -> int:
        return min(self.template.min_nodes or self.nodes, self.nodes)

    @property
    def procs_per_node(self) -> int:
        return self.template.procs_per_node or 1


@of_spec
def resolve(run: AlignmentRun) -> tuple[ResolvedPhase, ...]:
    """The run's phases, inputs before what builds on them. The run has been checked."""
    inputs = graph.edges(run.phases)
    entries = {entry.name: entry for entry in run.phases}
    return tuple(
        ResolvedPhase(
            name=name,
            type=entries[name].type,
            spec=_fill(entries[name], run),
            inputs=inputs[name],
            template=merge_templates(run.spec.template, entries[name].template),
            suspend=entries[name].suspend or run.spec.suspend,
        )
        for name in graph.topological(inputs)
    )


def _fill(entry: PhaseEntry, run: AlignmentRun) -> PhaseSpec:
    update: dict[str, object] = {}
    if entry.spec.seed is None:
        update["seed"] = run.spec.seed
    if "model" in type(entry.spec).model_fields and entry.spec.model is None:  # type: ignore[attr-defined]
        update["model"] = run.spec.model
    if graph.wants_all_models(entry):
        update["models"] = _all_models(entry, run.phases)
    return entry.spec.model_copy(update=update)


def _all_models(entry: PhaseEntry, entries: Sequence[PhaseEntry]) -> tuple[NamedModel, ...]:
    explicit = graph.explicit(entries)
    return tuple(NamedModel(phase=name) for name in graph.models_for(entry, entries, explicit))


def merge_templates(run: Template, phase: Template | None) -> Template:
    """The run's template with the fields that the phase sets; `env` by name."""
    if phase is None:
        return run
    env = {item.name: item for item in (*run.env, *phase.env)}
    update = {name: getattr(phase, name) for name in phase.model_fields_set}
    return run.model_copy(update=update | {"env": tuple(env.values())})

"""Sizes of the models that a run's references mean, through the phases that train them. Pure: configs are given."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from controller.api.run import AlignmentRun, PhaseEntry
from controller.plan.tokenizers import STARTS_FROM
from trainers.sizing.phases import some_layers
from trainers.sizing.shapes import ModelShape, UnknownSize, scratch_shape, shape_of
from trainers.spec import ArtifactRef, ModelRef, RewardModelRef

Configs = Mapping[tuple[str, str | None], Mapping[str, Any]]
"""The `config.json` of a source at a revision, of those that are known."""


class Shapes:
    """Of one run, which has been checked."""

    def __init__(self, run: AlignmentRun, configs: Configs) -> None:
        self.entries = {entry.name: entry for entry in run.phases}
        self.default = run.spec.model
        self.configs = configs

    def of(self, ref: ArtifactRef) -> ModelShape:
        """Raises UnknownSize, which names the source."""
        if ref.phase is not None:
            return self.left_by(self.entries[ref.phase])
        if isinstance(ref, ModelRef) and ref.scratch is not None:
            return scratch_shape(ref.scratch)
        assert isinstance(ref, ModelRef | RewardModelRef)
        config = self.configs.get((ref.source or "", ref.revision))
        if config is None:
            raise UnknownSize(f"the config.json of {ref.source} is not known here")
        try:
            shape = shape_of(config)
        except UnknownSize as error:
            raise UnknownSize(f"{ref.source}: {error}") from error
        return _scalar(shape) if isinstance(ref, RewardModelRef) else shape

    def left_by(self, entry: PhaseEntry) -> ModelShape:
        """Of the model that a phase leaves."""
        fields = [getattr(entry.spec, name, None) for name in STARTS_FROM]
        start = next((ref for ref in fields if isinstance(ref, ModelRef)), self.default)
        if start is None:
            raise UnknownSize(f"phase {entry.name} starts from no model")
        layers = getattr(start, "teacher_layers", None)
        if layers is not None:
            return some_layers(self.of(entry.spec.teacher), layers)  # type: ignore[attr-defined]
        shape = self.of(start)
        return _scalar(shape) if entry.type.produces == "reward-model" else shape


def _scalar(shape: ModelShape) -> ModelShape:
    return replace(shape, language_head=False, tied=False)


def sources(run: AlignmentRun) -> set[tuple[str, str | None]]:
    """Every source with its revision, of which a config would tell a size."""
    found = [ref for entry in run.phases for _, ref in entry.spec.references()]
    if run.spec.model is not None:
        found.append(run.spec.model)
    known = [ref for ref in found if isinstance(ref, ModelRef | RewardModelRef)]
    return {(ref.source, ref.revision) for ref in known if ref.source is not None}

"""What a user can set for packaging."""

from typing import Self

from pydantic import Field, model_validator

from trainers.spec import NamedModel, PhaseSpec, shown_labels


class PackageSpec(PhaseSpec):
    """Exported models with their cards, plots, samples, and a report of everything the run left."""

    models: tuple[NamedModel, ...] = ()
    """Models to export; all models of the run unless set. Only models that a phase left are exported."""
    title: str | None = Field(default=None, min_length=1)
    """Heading of the report; the run's name unless set."""
    samples: int = Field(default=12, ge=0)
    """Prompts shown with the responses of all models; a third of them ones that should be refused, if there are any."""

    @model_validator(mode="after")
    def _labels(self) -> Self:
        shown_labels(self.models)
        return self

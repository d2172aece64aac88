"""What a user can set for packaging."""

from typing import Self

from pydantic import Field, model_validator

from trainers.spec import NamedModel, PhaseSpec, shown_labels


class PackageSpec(PhaseSpec):
    """Exported models with their cards, plots, samples, and a report of everything the run left."""

    models: tuple[NamedModel, ...] = ()
    """Models to export; all models of the run unless set. Only models that a phase left are exported."""
    title: str = ""
    """Heading of the report; the run's name unless set."""
    samples: int = Field(default=12, ge=0, le=200)
    """Prompts shown with the responses of all models; rows of different `kind` or `shouldRefuse` take turns."""

    @model_validator(mode="after")
    def _labels(self) -> Self:
        for label, model in zip(shown_labels(self.models), self.models, strict=True):
            if model.url is not None:
                raise ValueError(
                    f"models: {label!r} is exported from its phase's files, no server is asked: leave url out"
                )
        return self

    def final_metrics(self) -> tuple[str, ...]:
        return ("models",)

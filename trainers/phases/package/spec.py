"""What a user can set for packaging."""

from pydantic import Field

from trainers.spec import NamedModel, PhaseSpec


class PackageSpec(PhaseSpec):
    """Exported models with cards, metrics, plots, samples, and one report."""

    models: tuple[NamedModel, ...] = ()
    """Models to export and to show; all models of the run unless set."""
    samples: int = Field(default=12, ge=0, le=200)
    """Prompts whose responses are shown side by side."""
    title: str = ""
    """Title of the report; the run's name unless set."""

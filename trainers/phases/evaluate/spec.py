"""What a user can set for evaluation."""

from trainers.spec import NamedModel, PhaseSpec


class EvaluateSpec(PhaseSpec):
    """Placeholder: owned by the evaluation author."""

    models: tuple[NamedModel, ...] = ()
    """Models to compare; all models of the run unless set."""

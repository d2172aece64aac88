"""Whether a model's positions leave room for a prompt before what it is to say."""

from collections.abc import Iterator

from controller.api.problems import Problem
from controller.api.run import AlignmentRun, PhaseEntry
from controller.plan.shapes import Configs, Shapes
from controller.plan.tokenizers import STARTS_FROM
from trainers.sizing.shapes import UnknownSize
from trainers.spec import ModelRef, Sampling

SPEAKING = ("ppo", "rollout", "distill")
"""Types whose own model responds."""


def room_problems(run: AlignmentRun, configs: Configs) -> Iterator[Problem]:
    """Of models whose sizes are known: scratch ones, and those of ``configs``. The run has been checked."""
    shapes = Shapes(run, configs)
    for entry in run.phases:
        if entry.type.name in SPEAKING and (problem := _problem(entry, shapes)) is not None:
            yield problem


def _problem(entry: PhaseEntry, shapes: Shapes) -> Problem | None:
    sampling: Sampling = entry.spec.sampling  # type: ignore[attr-defined]
    model = next(ref for name in STARTS_FROM if isinstance(ref := getattr(entry.spec, name, None), ModelRef))
    try:
        shape = shapes.left_by(entry) if getattr(model, "teacher_layers", None) is not None else shapes.of(model)
    except UnknownSize:
        return None
    if sampling.max_new_tokens < shape.positions or getattr(entry.spec, "on_policy_fraction", 1) == 0:
        return None
    return Problem(
        f"spec.phases[{entry.name}].{entry.type.name}.sampling.maxNewTokens",
        f"{sampling.max_new_tokens}: the model has {shape.positions} positions, for a prompt and the response together",
    )

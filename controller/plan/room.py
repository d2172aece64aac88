"""Whether a model's positions leave room for a prompt before what it is to say."""

from collections.abc import Iterator

from controller.api.problems import Problem
from controller.api.run import AlignmentRun, PhaseEntry
from controller.plan.resolve import resolve
from controller.plan.shapes import Configs, Shapes
from controller.plan.tokenizers import STARTS_FROM
from trainers.phases.evaluate.settings import SampledSpec
from trainers.phases.evaluate.spec import EvaluateSpec
from trainers.sizing.shapes import ModelShape, UnknownSize
from trainers.spec import ModelRef, Sampling

SPEAKING = ("ppo", "rollout", "distill")
"""Types whose own model responds."""


def room_problems(run: AlignmentRun, configs: Configs) -> Iterator[Problem]:
    """Of models whose sizes are known: scratch ones, and those of ``configs``. The run has been checked."""
    shapes = Shapes(run, configs)
    for entry in run.phases:
        if entry.type.name in SPEAKING and (problem := _problem(entry, shapes)) is not None:
            yield problem
    for phase in resolve(run):
        if isinstance(phase.spec, EvaluateSpec):
            yield from _of_evaluation(phase.name, phase.spec, shapes)


def _problem(entry: PhaseEntry, shapes: Shapes) -> Problem | None:
    sampling: Sampling = entry.spec.sampling  # type: ignore[attr-defined]
    model = next(ref for name in STARTS_FROM if isinstance(ref := getattr(entry.spec, name, None), ModelRef))
    try:
        shape = shapes.left_by(entry) if getattr(model, "teacher_layers", None) is not None else shapes.of(model)
    except UnknownSize:
        return None
    if sampling.max_new_tokens < shape.positions or getattr(entry.spec, "on_policy_fraction", 1) == 0:
        return None
    where = f"spec.phases[{entry.name}].{entry.type.name}.sampling"
    return _told(where, sampling, "the model", shape.positions)


def _of_evaluation(phase: str, spec: EvaluateSpec, shapes: Shapes) -> Iterator[Problem]:
    """One for each setting: of the model that has the fewest positions."""
    known = [(shape.positions, ref.label) for ref in spec.models if (shape := _known(ref, shapes)) is not None]
    if not known:
        return
    positions, label = min(known)
    here = f"spec.phases[{phase}].evaluate"
    settings = {}
    for entry in spec.benchmarks:
        if isinstance(entry.settings, SampledSpec):
            own = entry.settings.sampling
            where = "sampling" if own is None else f"benchmarks[{entry.name}].{entry.benchmark.name}.sampling"
            settings[where] = own or spec.sampling
    for where, sampling in settings.items():
        if sampling.max_new_tokens >= positions:
            yield _told(f"{here}.{where}", sampling, f"model {label}", positions)


def _known(ref: ModelRef, shapes: Shapes) -> ModelShape | None:
    try:
        return shapes.of(ref)
    except UnknownSize:
        return None


def _told(where: str, sampling: Sampling, model: str, positions: int) -> Problem:
    return Problem(
        f"{where}.maxNewTokens",
        f"{sampling.max_new_tokens}: {model} has {positions} positions, for a prompt and the response together",
    )

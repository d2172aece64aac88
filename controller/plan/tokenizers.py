"""Where a model's tokenizer comes from, through all the phases that trained it."""

from collections.abc import Iterator, Mapping

from controller.api.problems import Problem
from controller.api.run import AlignmentRun, PhaseEntry
from trainers.spec import ModelRef

STARTS_FROM = ("student", "policy", "model")
"""Fields, in this order, that hold the model a phase starts from; its tokenizer goes on to what the phase leaves."""

SAME_TOKENS = (("teacher", "student"), ("policy", "reference"))
"""Pairs of fields whose models score the same token ids."""


def tokenizer_problems(run: AlignmentRun) -> Iterator[Problem]:
    """Pairs that can be told apart from the run alone. Different sources are left to whoever can read them."""
    entries = {entry.name: entry for entry in run.phases}
    for entry in run.phases:
        for path, first, second in model_pairs(entry):
            ours, theirs = root(second, entry, entries, run.spec.model), root(first, entry, entries, run.spec.model)
            if ours and theirs and (reason := _different(theirs, ours)):
                yield Problem(path, reason)


def model_pairs(entry: PhaseEntry) -> Iterator[tuple[str, ModelRef, ModelRef]]:
    """(path of the second, first, second) for models of a phase that need one tokenizer."""
    for first, second in SAME_TOKENS:
        pair = getattr(entry.spec, first, None), getattr(entry.spec, second, None)
        if isinstance(pair[0], ModelRef) and isinstance(pair[1], ModelRef):
            yield f"spec.phases[{entry.name}].{entry.type.name}.{second}", pair[0], pair[1]


def root(
    ref: ModelRef, entry: PhaseEntry, entries: Mapping[str, PhaseEntry], default: ModelRef | None
) -> ModelRef | None:
    """The source or scratch model that a reference goes back to; None if that cannot be told. The graph has no loop."""
    if getattr(ref, "teacher_layers", None) is not None:
        ref = entry.spec.teacher  # type: ignore[attr-defined]
    if ref.phase is None:
        return ref if ref.source is not None or ref.scratch is not None else None  # a server has it
    before = entries[ref.phase]
    start = next((getattr(before.spec, f) for f in STARTS_FROM if getattr(before.spec, f, None) is not None), default)
    return root(start, before, entries, default) if isinstance(start, ModelRef) else None


def _different(teacher: ModelRef, student: ModelRef) -> str | None:
    if teacher.scratch is not None and student.scratch is not None:
        if teacher.scratch.tokenizer == student.scratch.tokenizer:
            return None
        return "its tokenizer is made otherwise than the other model's: give both scratch models the same tokenizer settings"
    if teacher.scratch is not None or student.scratch is not None:
        made, loaded = (teacher, student) if teacher.scratch is not None else (student, teacher)
        whose = "the other model's" if made is teacher else "its"
        return f"{whose} tokenizer is made on the spot and cannot match the one of {loaded.source}"
    return None

"""Whether the layers are there that `lora.targetModules` names."""

from collections.abc import Iterator

from controller.api.problems import Problem, nearest
from controller.api.run import AlignmentRun, PhaseEntry
from controller.plan.resolve import resolve
from controller.plan.shapes import Configs, Shapes
from controller.plan.tokenizers import STARTS_FROM
from trainers.sizing.families import READ_DIRECTLY
from trainers.sizing.shapes import ModelShape, UnknownSize
from trainers.spec import Lora, ModelRef

OTHERS = frozenset(
    {"lm_head", "embed_out", "embed_tokens", "embed_in", "embeddings", "wte", "wpe", "conv", "conv1d", "gate", "router"}
)
"""Last parts of names of what is no linear layer of a decoder layer, and may have adapters where a model has it."""


def adapter_problems(run: AlignmentRun, configs: Configs) -> Iterator[Problem]:
    """Of models whose layers are known: scratch ones, and those of ``configs``. The run has been checked."""
    shapes = Shapes(run, configs)
    entries = {entry.name: entry for entry in run.phases}
    for phase in resolve(run):
        lora: Lora | None = getattr(phase.spec, "lora", None)
        if lora is not None and lora.target_modules and (shape := _shape(entries[phase.name], shapes)) is not None:
            path = f"spec.phases[{phase.name}].{phase.type.name}.lora.targetModules"
            yield from (Problem(path, words) for name in lora.target_modules if (words := _wrong(name, shape)))


def _shape(entry: PhaseEntry, shapes: Shapes) -> ModelShape | None:
    model = next((ref for name in STARTS_FROM if isinstance(ref := getattr(entry.spec, name, None), ModelRef)), None)
    try:
        return shapes.left_by(entry) if model is None or hasattr(model, "teacher_layers") else shapes.of(model)
    except UnknownSize:
        return None


def _wrong(name: str, shape: ModelShape) -> str | None:
    last = name.rsplit(".", 1)[-1]
    directly = READ_DIRECTLY.get(shape.model_type, ())
    if last in directly:
        return f'"{name}": models of type {shape.model_type} read its weight without calling it'
    known = sorted({linear for layer in shape.layers for linear, _, _ in layer.linears} - {*directly})
    if last in known or last in OTHERS:
        return None
    return f'"{name}": no layer is called that; there are {", ".join(known)}{nearest(last, known)}'

"""A phase with as many responses side by side as its device's memory holds.

What is asked is the whole memory: a card's, or what a container may have of its machine. Never what is free at that moment:
the next attempt would go another way.
"""

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

from trainers.contract import BadInput
from trainers.sizing.devices import GIB, usable
from trainers.sizing.machine import machine_memory
from trainers.sizing.memory import Memory, Place
from trainers.sizing.phases import ShapeOf, least_needs
from trainers.sizing.rows import halvings_that_fit, halvings_that_help, most_rows, of_steps, with_fewer_rows
from trainers.sizing.shapes import ModelShape, UnknownSize, scratch_shape, shape_of
from trainers.smaller import times_halved
from trainers.spec import ArtifactRef, ModelRef, PhaseSpec, RewardModelRef, grown

if TYPE_CHECKING:
    from trainers.core.context import PhaseContext

MARGIN = 1.2
"""What is said to need more than so many times a device's memory does not fit: plans are within a fifth of what is measured."""


def with_room(ctx: "PhaseContext") -> PhaseSpec:
    """The phase's settings, the same in all of its processes: the device that holds least decides.

    Raises BadInput if one response alone is sure not to fit.
    """
    spec: PhaseSpec = ctx.spec
    if most_rows(spec) == 0:
        return spec
    own = _device_memory(ctx)
    found = [(_halvings(ctx, spec, own), own)]
    times, memory = max(ctx.workers.gather_objects(found))
    fewer = of_steps(with_fewer_rows(spec, times), ctx.workers.world, times_halved())
    if times and ctx.workers.is_main:
        print(
            f"{most_rows(fewer)} responses are sampled side by side instead of sampling.batchSize {most_rows(spec)}: "
            f"a device's {memory / GIB:.1f} GiB hold no more keys and values"
        )
    return fewer


def _halvings(ctx: "PhaseContext", spec: PhaseSpec, memory: int) -> int:
    try:
        return halvings(spec, _place(ctx), lambda ref: _shape(ctx, ref), memory, times_halved())
    except UnknownSize:
        return 0


def halvings(spec: PhaseSpec, place: Place, shape_of: ShapeOf, memory: int, halved: int = 0) -> int:
    """Of rows, until the phase fits into so many bytes of a device, or as often as it helps.

    Of what was asked for before that was ``halved``: half of what does not fit may fit as it is, and be what has run out of
    memory before.
    """
    room, asked = usable(memory, place.gpu), grown(spec, halved)

    def total(fewer: PhaseSpec) -> int:
        return least_needs(fewer, place, shape_of)[0].memory.total

    found = halvings_that_fit(asked, lambda fewer: total(fewer) <= room)
    if found is not None:
        return found
    _check_one(least_needs(with_fewer_rows(spec, most_rows(spec).bit_length()), place, shape_of)[0].memory, memory)
    return halvings_that_help(asked, total)


def _check_one(least: Memory, memory: int) -> None:
    """``least``: with one response at a time. Where steps of training need more than it, rows are not the matter."""
    step = least.gradients + least.exchange + least.activations
    if least.cache > step and least.total > MARGIN * memory:
        raise BadInput(
            f"sampling.batchSize 1 would need {least.total / GIB:.1f} GiB and a device has {memory / GIB:.1f}: take a smaller "
            "model, lower maxNewTokens or maxPromptLength, or use larger devices"
        )


def _place(ctx: "PhaseContext") -> Place:
    workers, local = ctx.workers, _local_processes()
    stated = (workers.zero or {}).get("zero_optimization", {})
    zero = {name: value for name, value in stated.items() if isinstance(value, int)}
    gpu = workers.device.type == "cuda"
    return Place(ctx.spec.parallel, max(1, workers.world // local), local, workers.bf16, gpu, zero)


def _local_processes() -> int:
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def _shape(ctx: "PhaseContext", ref: ArtifactRef) -> ModelShape:
    if isinstance(ref, ModelRef) and ref.scratch is not None:
        return scratch_shape(ref.scratch)
    assert isinstance(ref, ModelRef | RewardModelRef)
    try:
        config = Path(ctx.model_location(ref)) / "config.json"
        return shape_of(json.loads(config.read_text()))
    except (BadInput, OSError, ValueError) as error:
        raise UnknownSize(str(error)) from error  # loading it tells what is wrong


def _device_memory(ctx: "PhaseContext") -> int:
    """Bytes for this process: its card's, or its share of what its container or machine has."""
    if ctx.workers.device.type == "cuda":
        import torch

        return int(torch.cuda.get_device_properties(ctx.workers.device).total_memory)
    return machine_memory() // _local_processes()

"""What each phase of a run will need of a device's memory, whether that is there, and what would fit. Pure."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from controller.api.quantities import byte_count
from controller.api.run import AlignmentRun, Template
from controller.plan.resolve import ResolvedPhase, resolve
from controller.plan.shapes import Configs, Shapes
from trainers.sizing.devices import GIB, PRODUCT_LABEL, product_memory
from trainers.sizing.memory import Memory, Place
from trainers.sizing.phases import Needs, ShapeOf, phase_needs
from trainers.sizing.shapes import UnknownSize
from trainers.spec import Fsdp, Parallel, PhaseSpec

GPU = "nvidia.com/gpu"
GPU_RESERVE = GIB
"""CUDA's context, NCCL's and cuBLAS's workspaces: what is not there for tensors."""
CPU_RESERVE = 3 * GIB // 4
"""A process with torch and transformers, before it has a model: 0.5 GiB were measured, and rows and tokenizers come on top."""
FRAGMENTED = 0.05
"""Share of a GPU that the caching allocator cannot give out again in one piece."""
SMALLEST_PASS = 512
"""Tokens of a forward pass below which a step becomes slow."""
SHORT_PASS = 2048
"""Tokens of a forward pass below which checkpointing costs less than more passes do."""
BY_LAYERS = "whole weights for sampling do not fit: layers are gathered for every token, which is slow"


ZeroFiles = Mapping[str, Mapping[str, Any]]
"""`zero_optimization` of the DeepSpeed JSON files that are known, by what the run names them."""


@dataclass(frozen=True)
class Device:
    """Where one process computes."""

    gpu: bool
    name: str = ""
    """For people; empty where it is not known."""
    memory: int | None = None
    """Bytes for one process; None if it is not said."""
    beside: int | None = None
    """Bytes of the machine's memory for one process of a GPU; None if it is not said."""

    @property
    def usable(self) -> int | None:
        if self.memory is None:
            return None
        return int(self.memory * (1 - FRAGMENTED)) - GPU_RESERVE if self.gpu else self.memory - CPU_RESERVE

    def holds(self, memory: Memory) -> bool:
        """Asked only where it is known how large the device is."""
        assert self.usable is not None
        room = self.beside is None or memory.offloaded <= max(0, self.beside - CPU_RESERVE)
        return memory.total <= self.usable and room


@dataclass(frozen=True)
class PhaseSize:
    """What is known before a phase begins."""

    phase: str
    devices: int
    device: Device
    needs: Needs | None = None
    unknown: str = ""
    """Why it is not known what it needs; empty if it is."""
    advice: str = ""
    """What would fit, if this does not."""
    by_layers: bool = False
    """Whether it fits only because sampling gathers layers for every token, where whole weights do not fit."""

    @property
    def fits(self) -> bool | None:
        """None where that cannot be told."""
        if self.needs is None or self.device.usable is None:
            return None
        if not self.device.holds(self.needs.memory):
            return False
        return True if self.needs.activations_known else None


def run_sizes(run: AlignmentRun, configs: Configs, zero_files: ZeroFiles | None = None) -> dict[str, PhaseSize]:
    """By phase, in the order in which they can run; phases that hold no model are left out."""
    shape_of = Shapes(run, configs).of
    found = ((phase.name, phase_size(phase, shape_of, zero_files or {})) for phase in resolve(run))
    return {name: size for name, size in found if size is not None}


def phase_size(phase: ResolvedPhase, shape_of: ShapeOf, zero_files: ZeroFiles) -> PhaseSize | None:
    device = device_of(phase.template)
    place = place_of(phase, device, zero_files)
    try:
        needs = phase_needs(phase.spec, place, shape_of)
    except UnknownSize as error:
        return PhaseSize(phase.name, place.world, device, unknown=str(error))
    if needs is None:
        return None
    size = PhaseSize(phase.name, place.world, device, needs)
    if size.fits is not False:
        return size
    layered = replace(size, needs=phase_needs(phase.spec, replace(place, by_layers=True), shape_of), by_layers=True)
    if device.gpu and layered.fits is not False:
        return layered
    return replace(size, advice=_advice(phase, device, shape_of, zero_files))


def states_memory(run: AlignmentRun) -> bool:
    """Whether there is a phase of whose devices the run says how large they are."""
    return any(device_of(phase.template).memory is not None for phase in resolve(run))


def device_of(template: Template) -> Device:
    """A GPU if the pods ask for one or their nodes have one; else the pod's memory. Its processes share that."""
    product = template.node_selector.get(PRODUCT_LABEL, "")
    resources = {**template.resources.requests, **template.resources.limits} if template.resources else {}
    if product or template.gpu_memory is not None or GPU in resources:
        stated = byte_count(template.gpu_memory) if template.gpu_memory is not None else product_memory(product)
        return Device(True, product, stated, _share(template))
    return Device(False, "", _share(template))


def _share(template: Template) -> int | None:
    """Of the pod's memory, for one process."""
    limit = template.resources.limits.get("memory") if template.resources else None
    return byte_count(limit) // (template.procs_per_node or 1) if limit is not None else None


def place_of(phase: ResolvedPhase, device: Device, zero_files: ZeroFiles) -> Place:
    parallel = phase.spec.parallel
    bf16 = parallel.precision == "bf16" or (
        parallel.precision == "auto" and device.gpu and "V100" not in device.name and "T4" not in device.name
    )
    zero = zero_files.get(parallel.deepspeed.config or "", {}) if parallel.deepspeed is not None else {}
    return Place(parallel, phase.nodes, phase.procs_per_node, bf16, device.gpu, zero)


# ---------------------------------------------------------------- what would fit


def _advice(phase: ResolvedPhase, device: Device, shape_of: ShapeOf, zero_files: ZeroFiles) -> str:
    """The first change that makes it fit, from what costs nothing to what costs most time."""
    packed = (lora := getattr(phase.spec, "lora", None)) is not None and lora.quantization is not None
    for (said, spec, nodes), by_layers in _attempts(phase, device):
        if packed and spec.parallel.strategy == "fsdp":
            continue
        changed = replace(phase, spec=spec, template=_on(phase.template, nodes))
        place = replace(place_of(changed, device, zero_files), by_layers=by_layers)
        needs = phase_needs(changed.spec, place, shape_of)
        if needs is not None and device.holds(needs.memory):
            slow = f"; {BY_LAYERS}" if by_layers else ""
            return f"would fit with {said}: {shown(needs.memory.total)}{_beside(needs.memory)}{slow}"
    return "no strategy on these devices makes it fit: use larger ones or more of them, or a smaller model"


def _beside(memory: Memory) -> str:
    return f", and {shown(memory.offloaded)} of the machine's memory for each" if memory.offloaded else ""


def _with(spec: PhaseSpec, parallel: Parallel) -> PhaseSpec:
    return spec.model_copy(update={"parallel": parallel})


def _on(template: Template, nodes: int) -> Template:
    return template.model_copy(update={"nodes": nodes})


Change = tuple[str, PhaseSpec, int]
"""What is changed, in words; the phase's settings with it; and nodes."""


def _attempts(phase: ResolvedPhase, device: Device) -> Iterator[tuple[Change, bool]]:
    """Changes, and whether sampling gathers layers for every token: more nodes make no whole weights smaller."""
    yield from ((change, False) for change in _here(phase))
    if device.gpu:
        yield from ((change, True) for change in _here(phase))
    yield from ((change, False) for change in _elsewhere(phase))


def _here(phase: ResolvedPhase) -> Iterator[Change]:
    for said, parallel in _on_these_devices(phase):
        yield from _and_smaller(said, _with(phase.spec, parallel), phase.nodes)


def _elsewhere(phase: ResolvedPhase) -> Iterator[Change]:
    said, parallel = _split(phase.spec)
    for nodes in (more * phase.nodes for more in (2, 4, 8, 16, 32, 64)):
        yield from _and_smaller(f"nodes: {nodes}, {said}", _with(phase.spec, parallel), nodes)


def _and_smaller(said: str, spec: PhaseSpec, nodes: int) -> Iterator[Change]:
    yield said, spec, nodes
    for less, smaller in _smaller(spec):
        yield f"{said}{', ' if said else ''}{less}", smaller, nodes


def _trains(spec: PhaseSpec) -> bool:
    return hasattr(spec, "optim")


def _split(spec: PhaseSpec) -> tuple[str, Parallel]:
    now = spec.parallel
    if not _trains(spec):
        return "frozen: sharded", now.model_copy(update={"frozen": "sharded"})
    fsdp = {"strategy": "fsdp", "fsdp": Fsdp(), "deepspeed": None, "gradient_checkpointing": True}
    return "strategy: fsdp, gradientCheckpointing: true", now.model_copy(update=fsdp)


def _on_these_devices(phase: ResolvedPhase) -> Iterator[tuple[str, Parallel]]:
    now, several, trains = phase.spec.parallel, phase.nodes * phase.procs_per_node > 1, _trains(phase.spec)
    yield "", now
    checkpointing = now.model_copy(update={"gradient_checkpointing": True})
    if trains and not now.gradient_checkpointing:
        yield "gradientCheckpointing: true", checkpointing
    if several and not (now.splits_weights if trains else now.splits_frozen):
        said, split = _split(phase.spec)
        yield said, split
        if trains:
            yield (
                "strategy: fsdp, frozen: offloaded, gradientCheckpointing: true",
                split.model_copy(update={"frozen": "offloaded"}),
            )
    if several and not trains:
        yield "frozen: offloaded", now.model_copy(update={"frozen": "offloaded"})
    elif several:
        settings = (now.fsdp or Fsdp()).model_copy(update={"cpu_offload": True})
        offloaded = {"strategy": "fsdp", "fsdp": settings, "deepspeed": None, "frozen": "offloaded"}
        said = "strategy: fsdp, fsdp.cpuOffload: true, frozen: offloaded, gradientCheckpointing: true"
        yield said, checkpointing.model_copy(update=offloaded)


def _smaller(spec: PhaseSpec) -> Iterator[tuple[str, PhaseSpec]]:
    """Fewer tokens at once, where they are scored; fewer responses at once, where they are sampled."""
    tokens = spec.parallel.micro_batch_tokens // 2
    checkpoints = not _trains(spec) or spec.parallel.gradient_checkpointing
    while tokens >= (SMALLEST_PASS if checkpoints else SHORT_PASS):
        said = f"microBatchTokens: {tokens}"
        yield said, _with(spec, spec.parallel.model_copy(update={"micro_batch_tokens": tokens}))
        tokens //= 2
    sampling = getattr(spec, "sampling", None)
    size = sampling.batch_size // 2 if sampling is not None else 0
    while sampling is not None and size >= 1:
        smaller = sampling.model_copy(update={"batch_size": size})
        yield f"sampling.batchSize: {size}", spec.model_copy(update={"sampling": smaller})
        size //= 2


# ---------------------------------------------------------------- in words


def shown(size: int) -> str:
    """`38 GiB`, `1.5 GiB`, `210 MiB`."""
    value = size / GIB
    if value < 0.995:
        return f"{size / 2**20:.0f} MiB"
    return f"{value:.0f} GiB" if value >= 9.95 else f"{value:.1f} GiB"


UNKNOWN = "needs unknown"


def sentence(size: PhaseSize) -> str:
    """`needs 38 GiB of 80 GiB on each of 8 devices`."""
    if size.needs is None:
        return f"{UNKNOWN}: {size.unknown}"
    least = "" if size.needs.activations_known else "at least "
    of = "" if size.device.memory is None else f" of {shown(size.device.memory)}"
    where = "on one device" if size.devices == 1 else f"on each of {size.devices} devices"
    said = f"needs {least}{shown(size.needs.memory.total)}{of} {where}{_beside(size.needs.memory)}"
    if size.by_layers:
        return f"{said}; {BY_LAYERS}"
    return f"{said}, which does not fit; {size.advice}" if size.fits is False else said


def is_unknown(needs: str) -> bool:
    """Whether a :func:`sentence` says that it cannot be told."""
    return needs.startswith(UNKNOWN)


PARTS = ("weights", "gradients", "optimizer", "activations", "frozen", "exchange", "cache")
"""Of a :class:`Memory`, as tables list them."""


def parts(memory: Memory) -> dict[str, str]:
    return {name: shown(getattr(memory, name)) if getattr(memory, name) else "–" for name in PARTS}

"""What each phase of a run will need of a device's memory, whether that is there, and what would fit. Pure."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from controller.api.quantities import byte_count
from controller.api.run import AlignmentRun
from controller.api.template import Resources, Template
from controller.plan.advice import advise
from controller.plan.attempts import Extent
from controller.plan.resolve import ResolvedPhase, resolve
from controller.plan.shapes import Configs, Shapes
from trainers.sizing.devices import CPU_RESERVE, GIB, PRODUCT_LABEL, product_memory, usable
from trainers.sizing.memory import Memory, Place
from trainers.sizing.phases import Needs, ShapeOf, phase_needs, ways
from trainers.sizing.rows import halvings_that_fit, halvings_that_help, most_rows, of_steps, with_fewer_rows
from trainers.sizing.servers import ServerPlace
from trainers.sizing.shapes import UnknownSize
from trainers.spec import PhaseSpec, grown, shrunk

GPU = "nvidia.com/gpu"
CPU_CACHE = "VLLM_CPU_KVCACHE_SPACE"
"""GiB of keys and values of a vLLM on a processor."""
BY_LAYERS = "whole weights for sampling do not fit: layers are gathered for every token, which is slow"


ZeroFiles = Mapping[str, Mapping[str, Any]]
"""`zero_optimization` of the DeepSpeed JSON files that are known, by what the run names them."""


@dataclass(frozen=True)
class Here:
    """A machine without GPUs that phases would run on."""

    memory: int
    """Bytes, of which nothing says how many they may have."""
    cache: int | None = None
    """Bytes of keys and values of a vLLM, where the environment that phases get says."""


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
    here: Here | None = None
    """This machine, where phases would run on it and nothing says how much they may have."""

    @property
    def usable(self) -> int | None:
        return None if self.memory is None else usable(self.memory, self.gpu)

    @property
    def room(self) -> int | None:
        """For what is offloaded."""
        return None if self.beside is None else max(0, self.beside - CPU_RESERVE)

    def holds(self, needs: Needs) -> bool:
        """Asked only where it is known how large the device is."""
        assert self.usable is not None
        memory = needs.memory
        return memory.total <= self.usable and (self.room is None or memory.offloaded <= self.room)


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
    """Whether sampling gathers layers for every token, since whole weights do not fit."""
    rows: tuple[int, int] | None = None
    """Responses side by side, where it fits only with fewer than `sampling.batchSize` allows, and how many that are."""

    @property
    def fits(self) -> bool | None:
        """None where that cannot be told."""
        if self.needs is None:
            return None
        if self.needs.starved:
            return False
        if self.device.usable is None:
            return None
        if not self.device.holds(self.needs):
            return False
        return True if self.needs.known else None

    @property
    def of(self) -> int | None:
        """Bytes of the device, or of this machine, of which a vLLM alone is told how much it may take; None if it is not said."""
        if self.device.memory is not None or self.device.here is None:
            return self.device.memory
        server = self.needs.server if self.needs is not None else None
        return None if server is None or server.apart else self.device.here.memory

    @property
    def server_unknown(self) -> bool:
        """Whether it is not known what the vLLM takes that it starts."""
        return self.needs is not None and self.needs.server is not None and not self.needs.server.known


def run_sizes(
    run: AlignmentRun,
    configs: Configs,
    zero_files: ZeroFiles | None = None,
    extents: Mapping[str, Extent] | None = None,
    here: Here | None = None,
) -> dict[str, PhaseSize]:
    """By phase, in the order in which they can run; phases that hold no model are left out.

    ``extents``: of the phases whose attempts have less than was asked for. ``here``: a machine without GPUs, if the run would be
    one of it.
    """
    shape_of, found = Shapes(run, configs).of, {}
    for phase in resolve(run):
        extent = (extents or {}).get(phase.name, Extent(phase.nodes))
        found[phase.name] = phase_size(_on(phase, extent.nodes), shape_of, zero_files or {}, here, extent.halvings)
    return {name: size for name, size in found.items() if size is not None}


def _on(phase: ResolvedPhase, nodes: int) -> ResolvedPhase:
    return replace(phase, template=phase.template.model_copy(update={"nodes": nodes}))


def phase_size(
    phase: ResolvedPhase, shape_of: ShapeOf, zero_files: ZeroFiles, here: Here | None = None, halved: int = 0
) -> PhaseSize | None:
    """``halved``: for an attempt after so many that ran out of memory."""
    device = device_of(phase.template, here)
    place = place_of(phase, device, zero_files)
    size = PhaseSize(phase.name, place.world, device)
    try:
        needs = phase_needs(phase.spec, place, shape_of)
    except UnknownSize as error:
        return replace(size, unknown=str(error))
    if needs is None:
        return None
    found = _as_tried(phase, replace(size, needs=needs), place, shape_of, halved)
    return replace(found, advice=_advice(phase, device, shape_of, zero_files)) if found.fits is False else found


def _as_tried(phase: ResolvedPhase, size: PhaseSize, place: Place, shape_of: ShapeOf, halved: int) -> PhaseSize:
    """Layer by layer on GPUs, or with fewer responses side by side, or with what needs least: as the phase itself goes about it
    (`trainers/core/gathering.py`, `trainers/memory_room.py`), which knows how large its device is.
    """

    def sized(spec: PhaseSpec) -> PhaseSize:
        found = [replace(size, needs=phase_needs(spec, way, shape_of), by_layers=way.by_layers) for way in ways(place)]
        return next((some for some in found if some.fits is not False), min(found, key=_total))

    asked = grown(shrunk(phase.spec, halved), halved)  # all that the phase knows of it
    times = halvings_that_fit(asked, lambda spec: sized(spec).fits is not False)
    if times is None:
        times = halvings_that_help(asked, lambda spec: _total(sized(spec)))
    tried = of_steps(shrunk(with_fewer_rows(asked, times), halved), place.world, halved)
    return replace(sized(tried), rows=(most_rows(tried), most_rows(phase.spec)) if times else None)


def _total(size: PhaseSize) -> int:
    assert size.needs is not None
    return size.needs.memory.total


def states_memory(run: AlignmentRun) -> bool:
    """Whether there is a phase of whose devices the run says how large they are."""
    return any(device_of(phase.template).memory is not None for phase in resolve(run))


def device_of(template: Template, here: Here | None = None) -> Device:
    """A GPU if the pods ask for one or their nodes have one; else the pod's memory. Its processes share that."""
    product = template.node_selector.get(PRODUCT_LABEL, "")
    resources = {**template.resources.requests, **template.resources.limits} if template.resources else {}
    if product or template.gpu_memory is not None or GPU in resources:
        return Device(True, product, _gpu_memory(template), _share(template))
    share = _share(template)
    return Device(False, "", share, here=here if share is None else None)


def _gpu_memory(template: Template) -> int | None:
    if template.gpu_memory is not None:
        return byte_count(template.gpu_memory)
    return product_memory(template.node_selector.get(PRODUCT_LABEL, ""))


def _share(template: Template) -> int | None:
    """Of the pod's memory, for one process."""
    limit = _limit(template.resources)
    return limit // (template.procs_per_node or 1) if limit is not None else None


def _limit(resources: Resources | None) -> int | None:
    """A container's memory in bytes, if it is said."""
    limit = resources.limits.get("memory") if resources else None
    return byte_count(limit) if limit is not None else None


def place_of(phase: ResolvedPhase, device: Device, zero_files: ZeroFiles) -> Place:
    parallel = phase.spec.parallel
    bf16 = parallel.precision == "bf16" or (
        parallel.precision == "auto" and device.gpu and "V100" not in device.name and "T4" not in device.name
    )
    zero = zero_files.get(parallel.deepspeed.config or "", {}) if parallel.deepspeed is not None else {}
    server = server_place(phase.template, device)
    return Place(parallel, phase.nodes, phase.procs_per_node, bf16, device.gpu, zero, server=server)


def server_place(template: Template, device: Device) -> ServerPlace:
    """With a container of its own it has that one's devices, whose GPUs are the node's, else the phase's."""
    stated = {item.name: item.value for item in template.env}
    here = device.here or Here(0)
    cache = cpu_cache(stated) if CPU_CACHE in stated else here.cache
    if template.server is None:
        memory = device.memory if device.gpu else _limit(template.resources) or here.memory or None
        return ServerPlace(device.gpu, memory, cache)
    resources = template.server.resources
    if resources is None or GPU not in {**resources.requests, **resources.limits}:
        return ServerPlace(False, _limit(resources), cache, apart=True)
    return ServerPlace(True, _gpu_memory(template), cache, apart=True)


def cpu_cache(environment: Mapping[str, str]) -> int | None:
    """Bytes of keys and values that a vLLM on a processor is told to take; None if it is not, or by what is no number."""
    told = environment.get(CPU_CACHE, "")
    return int(told) * GIB if told.isdecimal() else None


# ---------------------------------------------------------------- what would fit


def _advice(phase: ResolvedPhase, device: Device, shape_of: ShapeOf, zero_files: ZeroFiles) -> str:
    def fit_of(changed: ResolvedPhase, by_layers: bool) -> Memory | None:
        place = replace(place_of(changed, device, zero_files), by_layers=by_layers)
        needs = phase_needs(changed.spec, place, shape_of)
        fits = needs is not None and PhaseSize(phase.name, place.world, device, needs).fits is not False
        return needs.memory if needs is not None and fits else None

    found = advise(phase, device.gpu, fit_of)
    if found is None:
        return "no strategy on these devices makes it fit: use larger ones or more of them, or a smaller model"
    slow = f"; {BY_LAYERS}" if found.by_layers else ""
    return f"would fit with {found.words}: {shown(found.memory.total)}{_beside(found.memory)}{slow}"


def _beside(memory: Memory) -> str:
    return f", and {shown(memory.offloaded)} of the machine's memory for each" if memory.offloaded else ""


# ---------------------------------------------------------------- in words


def shown(size: int) -> str:
    """`38 GiB`, `1.5 GiB`, `210 MiB`."""
    value = size / GIB
    if value < 0.995:
        return f"{size / 2**20:.0f} MiB"
    return f"{value:.0f} GiB" if value >= 9.95 else f"{value:.1f} GiB"


def _set_aside(device: Device, memory: Memory) -> str:
    """Where the figures alone do not tell why it does not fit."""
    if device.memory is not None and device.usable is not None and device.usable < memory.total <= device.memory:
        return f", of which {shown(max(0, device.usable))} can be used"
    if device.room is not None and memory.offloaded > device.room:
        return f", where there are {shown(device.room)}"
    return ""


UNKNOWN = "needs unknown"


def sentence(size: PhaseSize) -> str:
    """`needs 38 GiB of 80 GiB on each of 8 devices`."""
    if size.needs is None:
        return f"{UNKNOWN}: {size.unknown}"
    least = "" if size.needs.known else "at least "
    where = "on one device" if size.devices == 1 else f"on each of {size.devices} devices"
    said = f"needs {least}{shown(size.needs.memory.total)}{_of(size)} {where}{_beside(size.needs.memory)}"
    said += _set_aside(size.device, size.needs.memory) if size.fits is False else ""
    said += server_words(size.needs) if size.needs.server is not None else ""
    if size.rows is not None:
        few, wanted = size.rows
        said += f" with {few} response{'s' * (few != 1)} side by side instead of {wanted}"
    if size.fits is not False:
        return f"{said}; {BY_LAYERS}" if size.by_layers else said
    said += ", with layers gathered for every token" if size.by_layers else ""
    return f"{said}, which does not fit; {size.advice}"


def _of(size: PhaseSize) -> str:
    if size.of is None:
        return ""
    return f" of {shown(size.of)}" if size.device.memory is not None else f" of this machine's {shown(size.of)}"


def server_words(needs: Needs) -> str:
    """What is told of a vLLM that the phase starts, behind what the phase needs."""
    server = needs.server
    assert server is not None
    where = " in a container of its own" if server.apart else ""
    said = f", {'and' if server.apart else 'of which'} {shown(server.taken)} for vLLM{where}"
    if not server.known:
        return f"{said}: what it starts with, and it takes {server.share:g} of the memory there"
    if not server.starved:
        return said
    sequence = f" and a sequence of {server.length} tokens" if server.length else ""
    return f"{said}, less than the {shown(server.least)} of its weights{sequence}"


def is_unknown(needs: str) -> bool:
    """Whether a :func:`sentence` says that it cannot be told."""
    return needs.startswith(UNKNOWN)


PARTS = ("weights", "gradients", "optimizer", "activations", "frozen", "exchange", "cache", "vllm")
"""Of a :class:`Memory`, as tables list them."""


def parts(memory: Memory) -> dict[str, str]:
    return {name: shown(getattr(memory, name)) if getattr(memory, name) else "–" for name in PARTS}

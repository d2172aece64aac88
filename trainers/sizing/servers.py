"""What a vLLM that a phase starts takes of devices, by its flags as vLLM 0.32 reads them.

Sources: `vllm/config/cache.py`, `vllm/platforms/cpu.py`, `vllm/v1/worker/cpu_worker.py`.
"""

from dataclasses import dataclass

from trainers.sizing.shapes import UNSTATED, ModelShape
from trainers.spec import OwnServer
from trainers.spec.server_flags import LENGTH_FLAG, SHARE_FLAG, read_count

SHARE = 0.92
"""Of a device's memory that vLLM takes for all that it holds, unless told; on a processor of the container's limit too."""

PROCESSES = 2 * 2**30
"""Of a server on a processor, beside weights, keys and values: its three processes, each with torch; 1.9 GiB were measured."""

NUMBERS = {"float32": 4, "float": 4, "bfloat16": 2, "float16": 2, "half": 2}


@dataclass(frozen=True)
class ServerPlace:
    """What a server has to itself, or shares with its phase."""

    gpu: bool = False
    memory: int | None = None
    """Bytes of one device, which on a processor is all that the container may use; None if it is not said."""
    cache: int | None = None
    """Bytes of keys and values, where the environment says (VLLM_CPU_KVCACHE_SPACE); of a processor alone."""
    apart: bool = False
    """Whether its devices are not the phase's."""


@dataclass(frozen=True)
class ServerSize:
    """Of one device; of all of a processor's memory."""

    taken: int
    """What it takes, or the least of it that is known."""
    least: int
    """What it does not start without: weights, and the keys and values of one sequence as long as it may be."""
    length: int
    """Tokens of that sequence."""
    share: float | None
    """Of the device's memory, where that is how its size is set."""
    known: bool
    apart: bool

    @property
    def starved(self) -> bool:
        """Whether what it may take is known to be too little."""
        return self.known and self.taken < self.least


def server_size(place: ServerPlace, shape: ModelShape, number: int, own: OwnServer) -> ServerSize:
    """``number``: bytes of one in the phase's arithmetic. Quantized weights are not counted: no flag tells what they take."""
    flags = own.flags
    number = NUMBERS.get(flags.get("--dtype", ""), number)
    split = _count(flags, "--tensor-parallel-size", "-tp") * _count(flags, "--pipeline-parallel-size", "-pp")
    weights = 0 if flags.get("--quantization", flags.get("-q")) else number * shape.parameters // split
    length = _count(flags, LENGTH_FLAG, default=0 if shape.positions == UNSTATED else shape.positions)
    of_a_token = shape.cache * (1 if flags.get("--kv-cache-dtype", "").startswith("fp8") else number)
    processes = 0 if place.gpu else PROCESSES
    least = weights + of_a_token * length // split + processes
    told = None if place.gpu else place.cache  # which vLLM takes instead of the flag
    given = read_count(flags.get("--kv-cache-memory-bytes", "")) if told is None else told
    if given is not None:
        return ServerSize(weights + given + processes, least, length, None, True, place.apart)
    share = float(flags.get(SHARE_FLAG, SHARE))
    if place.memory is None:
        return ServerSize(weights + processes, least, length, share, False, place.apart)
    return ServerSize(int(share * place.memory), least, length, share, True, place.apart)


def _count(flags: dict[str, str], *names: str, default: int = 1) -> int:
    """As the first of these flags has it, `4096` or `4k`; vLLM refuses what is no number."""
    found = next((read_count(flags[name]) for name in names if name in flags), None)
    return default if found is None else found

"""Which settings would make a phase fit its devices. Pure.

They are applied as a user would, through the same rules; so nothing is advised that the phase has not, or that is refused.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from pydantic import ValidationError

from controller.plan.resolve import ResolvedPhase
from trainers.phases.evaluate.spec import EvaluateSpec
from trainers.sizing.memory import Memory
from trainers.spec import OwnServer, Parallel, PhaseSpec, Sampling
from trainers.spec.server_flags import LENGTH_FLAG, SHARE_FLAG

SMALLEST_PASS = 512
"""Tokens of a forward pass below which a step becomes slow."""
SHORT_PASS = 2048
"""Tokens of a forward pass below which checkpointing costs less than more passes do."""
MOST_NODES = 64
"""Times as many as there are."""

SHARES = ("0.9", "0.8", "0.7", "0.6", "0.5", "0.4", "0.3", "0.2", "0.1")
"""Of a device's memory for a vLLM."""

NODES = "nodes"
CHECKPOINTING = "parallel.gradientCheckpointing"
TOKENS = "parallel.microBatchTokens"

Settings = Mapping[str, Any]
"""By their path in the phase, in which items of lists have names; and `nodes` of its template. None leaves a field out."""

FitOf = Callable[[ResolvedPhase, bool], Memory | None]
"""What a phase needs, if that is there. True: sampling gathers layers for every token."""


@dataclass(frozen=True)
class Fit:
    """What would fit, with no setting that is not needed for it."""

    settings: Settings
    memory: Memory
    by_layers: bool

    @property
    def words(self) -> str:
        """`strategy: fsdp, sampling.batchSize: 8`."""
        return ", ".join(f"{path.removeprefix('parallel.')}: {_yaml(value)}" for path, value in self.settings.items())


def _yaml(value: Any) -> str:
    if isinstance(value, list):  # of words: a number would not be one
        words = (repr(word) if word[:1].isdigit() else word for word in value)
        return f"[{', '.join(words)}]"
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def advise(phase: ResolvedPhase, gpu: bool, fit_of: FitOf) -> Fit | None:
    """The first change that makes it fit, from what costs nothing to what costs most time."""
    for settings, by_layers in _attempts(phase, gpu):
        fit = _fit(phase, settings, by_layers, fit_of)
        if fit is not None:
            return _without_needless(phase, fit, fit_of)
    return None


def changed(phase: ResolvedPhase, settings: Settings) -> ResolvedPhase | None:
    """The phase as it would be with them; None if it would be refused."""
    document = phase.spec.document(exclude_unset=True)  # what is not said is not checked against what is
    for path, value in settings.items():
        if path != NODES:
            _put(document, path.split("."), value)
    nodes = settings.get(NODES, phase.nodes)
    try:
        spec = type(phase.spec).model_validate(document)
    except ValidationError:
        return None
    if spec.parallel.strategy == "single" and nodes * phase.procs_per_node > 1:
        return None
    return replace(phase, spec=spec, template=phase.template.model_copy(update={"nodes": nodes}))


def _put(document: Any, path: list[str], value: Any) -> None:
    *way, last = path
    for name in way:
        if isinstance(document, list):
            document = next(item for item in document if item.get("name") == name)
        else:
            document = document.setdefault(name, {})
    if value is None:
        document.pop(last, None)
    else:
        document[last] = value


def _fit(phase: ResolvedPhase, settings: Settings, by_layers: bool, fit_of: FitOf) -> Fit | None:
    found = changed(phase, settings)
    memory = fit_of(found, by_layers) if found is not None else None
    return Fit(settings, memory, by_layers) if memory is not None else None


def _without_needless(phase: ResolvedPhase, fit: Fit, fit_of: FitOf) -> Fit:
    for path in sorted(fit.settings, key=lambda path: path != CHECKPOINTING):
        less = {name: value for name, value in fit.settings.items() if name != path}
        if path == CHECKPOINTING and less.get(TOKENS, SHORT_PASS) < SHORT_PASS:
            continue
        fit = _fit(phase, less, fit.by_layers, fit_of) or fit
    return fit


# ---------------------------------------------------------------- what is tried


def _attempts(phase: ResolvedPhase, gpu: bool) -> Iterator[tuple[Settings, bool]]:
    """Changes, and whether sampling gathers layers for every token: more nodes make no whole weights smaller."""
    for by_layers in (False, True) if gpu else (False,):
        for way in _here(phase):
            yield from ((settings, by_layers) for settings in _and_smaller(phase, way))
    for way in _elsewhere(phase):
        yield from ((settings, False) for settings in _and_smaller(phase, way))


def _here(phase: ResolvedPhase) -> Iterator[dict[str, Any]]:
    """More and more of what makes it smaller on the same devices."""
    several = phase.nodes * phase.procs_per_node > 1
    yield {}
    if not _trains(phase.spec):
        yield from ({"parallel.frozen": "sharded"}, {"parallel.frozen": "offloaded"}) if several else ()
        return
    computed_again = {CHECKPOINTING: True}
    yield computed_again
    if several:
        yield {"parallel.frozen": "sharded"} | computed_again
    for split, offload in _splits(phase.spec.parallel):
        if several:
            yield split | computed_again
            yield split | {"parallel.frozen": "sharded"} | computed_again
            yield split | {"parallel.frozen": "offloaded"} | computed_again
        yield split | offload | {"parallel.frozen": "offloaded"} | computed_again


def _elsewhere(phase: ResolvedPhase) -> Iterator[dict[str, Any]]:
    many = [2**power for power in range(1, MOST_NODES.bit_length())]
    for nodes in (times * phase.nodes for times in many):
        if not _trains(phase.spec):
            yield {NODES: nodes, "parallel.strategy": "auto", "parallel.frozen": "sharded"}
            continue
        for split, _ in _splits(phase.spec.parallel):
            yield {NODES: nodes} | split | {CHECKPOINTING: True}


def _splits(now: Parallel) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """What splits what is trained as far as it goes, and what puts that into the machine's memory."""
    # A DeepSpeed file of the user's may contradict.
    if now.strategy == "deepspeed" and (now.deepspeed is None or now.deepspeed.config is None):
        section = "parallel.deepspeed."
        yield {f"{section}stage": 3}, {f"{section}offloadOptimizer": True, f"{section}offloadParameters": True}
    split: dict[str, Any] = {} if now.strategy == "fsdp" else {"parallel.strategy": "fsdp"}
    split |= {"parallel.deepspeed": None} if now.deepspeed is not None else {}
    if now.fsdp is not None:
        split |= {"parallel.fsdp.hybrid": False} if now.fsdp.hybrid else {}
        split |= {} if now.fsdp.reshard_after_forward else {"parallel.fsdp.reshardAfterForward": True}
    yield split, {"parallel.fsdp.cpuOffload": True}


def _trains(spec: PhaseSpec) -> bool:
    return hasattr(spec, "optim")


def _and_smaller(phase: ResolvedPhase, way: dict[str, Any]) -> Iterator[Settings]:
    """And fewer tokens at once, where they are scored; and fewer responses at once, where they are sampled."""
    yield way
    servers = list(_other_servers(phase.spec))
    yield from (way | other for other in servers)
    checkpoints = CHECKPOINTING in way or phase.spec.parallel.gradient_checkpointing or not _trains(phase.spec)
    tokens = _halves(phase.spec.parallel.micro_batch_tokens, SMALLEST_PASS if checkpoints else SHORT_PASS)
    passes: list[dict[str, Any]] = [{TOKENS: size} for size in tokens]
    yield from (way | less for less in passes)
    for fewest in ({}, *passes[-1:]):
        yield from (way | fewest | less for less in (*_fewer_responses(phase.spec), *(servers if fewest else ())))


def _other_servers(spec: PhaseSpec) -> Iterator[dict[str, Any]]:
    """A vLLM of shorter sequences, and of more or less of the device's memory, the most first."""
    if not spec.starts_server:
        return
    own: OwnServer = getattr(spec, "server", None) or OwnServer()
    short = {LENGTH_FLAG: str(length)} if (length := _longest(spec)) else {}
    yield {"server.args": own.with_flags(short)}
    for share in SHARES:
        for flags in ({SHARE_FLAG: share}, {SHARE_FLAG: share} | short):
            yield {"server.args": own.with_flags(flags)}


def _longest(spec: PhaseSpec) -> int | None:
    """Tokens of a prompt and its response, of the phases that say."""
    data = getattr(spec, "prompts", None) or getattr(spec, "data", None)
    prompt, sampling = getattr(data, "max_prompt_length", None), getattr(spec, "sampling", None)
    return prompt + sampling.max_new_tokens if prompt and sampling is not None else None


def _fewer_responses(spec: PhaseSpec) -> Iterator[dict[str, Any]]:
    found = list(_sampled(spec))
    for size in _halves(max((sampling.batch_size for _, sampling in found), default=1), 1):
        yield {f"{path}.batchSize": size for path, sampling in found if sampling.batch_size > size}


def _sampled(spec: PhaseSpec) -> Iterator[tuple[str, Sampling]]:
    sampling = getattr(spec, "sampling", None)
    if isinstance(sampling, Sampling):
        yield "sampling", sampling
    for entry in spec.benchmarks if isinstance(spec, EvaluateSpec) else ():
        own = getattr(entry.settings, "sampling", None)
        if own is not None:
            yield f"benchmarks.{entry.name}.{entry.benchmark.name}.sampling", own


def _halves(size: int, least: int) -> Iterator[int]:
    while (size := size // 2) >= least:
        yield size

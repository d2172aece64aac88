"""Steps of sampling as CUDA graphs: what a step launches is recorded once, and launched as one from then on.

A graph does what was done when it was recorded, on the same addresses. So a step is a function over buffers that stay where
they are, of which nothing is looked at in Python, and it is recorded anew for each number of rows and for each of a few
widths, up to which keys are looked at. Graphs last as long as a call of the engine: between calls weights are trained, and
autocast's copies of them, keys and values are given back.

None of it has met a GPU (docs/adr/0036). So a graph is only believed once it has done what the step itself does.
"""

import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import cache, partial
from typing import Any

import torch

from trainers.core.lean import LLAMAS, is_lean
from trainers.core.products import step as eighth
from trainers.sizing.at_once import NARROWEST
from trainers.spec import Sampling

Replay = Callable[[], None]
Record = Callable[[Callable[[], None]], Replay]
"""Runs a function once, and returns what does the same again to the same tensors."""

FEWEST = 16
"""New tokens for which graphs are worth it: to run a step, record it and compare takes as long as some four steps."""
NATS = 1e-2
"""How far a graph's log-probabilities may be off those of the step that it was recorded of."""

given_up: list[Any] = []
"""Why this process uses no graphs any more, and what has to stay because torch still refers to it."""


def wide(width: int) -> int:
    """The next one of the widths that graphs are recorded for."""
    unit = max(NARROWEST, eighth(width))
    return -(-width // unit) * unit


def recorder(device: torch.device, alone: bool = True) -> Record | None:
    """What records on a device: None where there are no graphs, or none any more.

    Not ``alone``: another thread computes meanwhile.
    """
    if device.type != "cuda" or given_up:
        return None
    if not alone:
        _say_why("responses are sampled beside updates, where none was ever recorded")
        return None
    return CudaRecorder()


def graphs_for(model: Any, sampling: Sampling, record: Record | None) -> "Graphs | None":
    """For a call of the engine, which has something to record with or not; says once why a model has none."""
    if record is None:
        return None
    if (reason := why_not(model, sampling)) is not None:
        _say_why(reason)
        return None
    return Graphs(record)


def why_not(model: Any, sampling: Sampling) -> str | None:
    """Why a model's steps are not recorded, or None."""
    kind = model.config.model_type
    if kind not in LLAMAS:
        return f"models of type {kind} are computed by transformers, whose steps may look at the device"
    if not is_lean(model):
        return "something hangs on the model's parts being called, as what gathers split weights does"
    if any(getattr(weight, "quant_state", None) is not None for weight in model.parameters()):
        return "its weights are packed in bits"
    if sampling.max_new_tokens < FEWEST:
        return f"responses have fewer than {FEWEST} tokens"
    return None


def _say_why(reason: str) -> None:
    if os.environ.get("RANK", "0") == "0":
        _say(f"sampling without CUDA graphs: {reason}")


@cache
def _say(line: str) -> None:
    print(line, flush=True)


class Graphs:
    """Steps of one call of the engine."""

    def __init__(self, record: Record) -> None:
        self.record: Record | None = record
        self.made: dict[int, Replay] = {}
        """By width, for the rows that are side by side now."""

    def run(self, step: Callable[[int], None], width: int, buffers: Sequence[torch.Tensor]) -> None:
        """A step that looks at keys up to ``width`` or somewhat more, and leaves all that it does in ``buffers``."""
        wider = wide(width)
        if wider in self.made:
            self.made[wider]()
        elif self.record is None:
            step(width)
        else:
            self._begin(self.record, partial(step, wider), wider, buffers)

    def forget(self) -> None:
        """Buffers are others from now on."""
        self.made.clear()

    def _begin(self, record: Record, step: Replay, width: int, buffers: Sequence[torch.Tensor]) -> None:
        """Nothing is lost where it fails: the step is then taken as it is."""
        before = [buffer.clone() for buffer in buffers]
        try:
            replay = record(step)
            after = [buffer.clone() for buffer in buffers]
            _put(buffers, before)
            replay()
            if not all(map(_alike, buffers, after)):
                raise RuntimeError("a graph does something else than the step that it was recorded of")
            self.made[width] = replay
        except RuntimeError as error:
            self._give_up(error)
            _put(buffers, before)
            step()

    def _give_up(self, error: RuntimeError) -> None:
        self.record = None
        self.made.clear()
        reason = str(error.__context__ or error).strip().split("\n")[0]
        given_up.append(reason)
        _say(f"sampling goes on without CUDA graphs: {reason}")


def _put(buffers: Sequence[torch.Tensor], content: Sequence[torch.Tensor]) -> None:
    for buffer, was in zip(buffers, content, strict=True):
        buffer.copy_(was)


def _alike(found: torch.Tensor, wanted: torch.Tensor) -> bool:
    if not found.is_floating_point():
        return torch.equal(found, wanted)
    return torch.allclose(found, wanted, rtol=0, atol=NATS, equal_nan=True)


class CudaRecorder:
    """Records on the GPU of this process. The graphs of a call share memory, which is given back with the last of them."""

    def __init__(self) -> None:
        self.pool: Any = torch.cuda.MemPool()
        self.stream = _stream()

    def __call__(self, step: Replay) -> Replay:
        """Runs on the stream that records first: cuBLAS then has its workspace there, outside of the graphs' memory."""
        graph, around = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        self.stream.wait_stream(around)
        with torch.cuda.stream(self.stream):
            step()
            self._capture(graph, step)
        around.wait_stream(self.stream)
        return graph.replay

    def _capture(self, graph: torch.cuda.CUDAGraph, step: Replay) -> None:
        """Not by ``torch.cuda.graph``, which gives the allocator's free memory back to the driver each time."""
        try:
            graph.capture_begin(pool=self.pool.id, capture_error_mode="thread_local")
            try:
                step()
            finally:
                graph.capture_end()
        except RuntimeError:
            # Otherwise the allocator would go on to ask this graph, for every tensor, whether it is the graph's.
            given_up.append((graph, self.pool))
            with suppress(RuntimeError):
                torch._C._cuda_endAllocateToPool(torch.cuda.current_device(), self.pool.id)
            raise


@cache
def _stream() -> torch.cuda.Stream:
    """One for all calls: what is allocated on a stream stays with it."""
    return torch.cuda.Stream()

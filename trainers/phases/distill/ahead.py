"""Traces of the next step that has some: read, and the teacher asked about them, while this step is learned from."""

from collections.abc import Callable
from collections.abc import Sequence as List
from typing import Generic, TypeVar

from trainers.core.examples import Steps
from trainers.core.rows import Item
from trainers.phases.distill.streams import Streams

T = TypeVar("T", bound=Item)


class Ahead(Generic[T]):
    """One batch is held beside the one that is used, so no more than two are with the teacher."""

    def __init__(
        self, streams: Streams, traces: Steps[T], total_steps: int, ask: Callable[[List[T]], None] | None
    ) -> None:
        """``ask``: what begins as soon as a batch is known; without it batches are read when their step comes."""
        self._streams, self._traces, self._total_steps, self._ask = streams, traces, total_steps, ask
        self._held: tuple[int, list[T]] | None = None

    def batch(self, step: int) -> list[T]:
        """Of a step on traces."""
        if self._held is not None and self._held[0] == step:
            return self._held[1]
        batch = self._traces.batch(self._streams.index(step))
        if self._ask is not None:
            self._ask(batch)
        return batch

    def prepare(self, step: int) -> None:
        """Hold the batch of the first step on traces from this one on."""
        while step < self._total_steps and self._streams.on_policy(step):
            step += 1
        if self._ask is None or step >= self._total_steps or (self._held is not None and self._held[0] == step):
            return
        self._held = (step, self.batch(step))

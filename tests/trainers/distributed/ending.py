"""Phases of which processes are killed or asked to stop, at a moment of their training that is chosen by a seed."""

import os
import random
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from distributed.processes import Phases


@dataclass(frozen=True)
class Ending:
    """What happens to which ranks, after which part of the steps and how much later."""

    what: signal.Signals
    ranks: tuple[int, ...]
    part: float
    seconds: float

    @classmethod
    def chosen(cls, name: str, processes: int, key: str) -> "Ending":
        """``SIGKILL of all``, ``SIGTERM of one`` and the like, at a moment that is a function of the key."""
        rng = random.Random(key)
        what, _, who = name.partition(" of ")
        ranks = tuple(range(processes)) if who == "all" else (rng.randrange(processes),)
        return cls(signal.Signals[what], ranks, rng.random(), rng.uniform(0, 0.3))


def run_until(files: Phases, endings: list[Ending]) -> int:
    """Phases one after the other; each comes to its own end. Returns the last one's exit code."""
    from trainers import launch

    code = 0
    for (kind, path), ending in zip(files, endings, strict=True):
        with _coming(ending):
            code = launch.run_phase(kind, path, [])
    return code


@contextmanager
def _coming(ending: Ending) -> Iterator[None]:
    from trainers.core.checkpoint import Checkpoints

    after_step = Checkpoints.after_step
    rank = int(os.environ.get("RANK", "0"))

    def watched(self: Any, step: int, total: int, *args: Any) -> None:
        if rank in ending.ranks:
            if step == 1 + int(ending.part * (total - 1)):
                threading.Timer(ending.seconds, os.kill, (os.getpid(), ending.what)).start()
            while step == total - 1 and self.ctx.stop_signal is None:
                time.sleep(0.001)  # it comes before the last step
        after_step(self, step, total, *args)

    Checkpoints.after_step = watched  # type: ignore[method-assign]
    try:
        yield
    finally:
        Checkpoints.after_step = after_step  # type: ignore[method-assign]

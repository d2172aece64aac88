"""Phases of which processes are killed or asked to stop, at a moment of their training that is chosen by a seed."""

import os
import random
import signal
import threading
import time
from contextlib import AbstractContextManager
from dataclasses import dataclass

from distributed.acting import after_steps
from distributed.processes import Phases

from trainers.core.context import PhaseContext


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


def _coming(ending: Ending) -> AbstractContextManager[None]:
    rank = int(os.environ.get("RANK", "0"))

    def act(step: int, total: int, ctx: PhaseContext) -> None:
        if rank not in ending.ranks:
            return
        if step == 1 + int(ending.part * (total - 1)):
            threading.Timer(ending.seconds, os.kill, (os.getpid(), ending.what)).start()
        while step == total - 1 and ctx.stop_signal is None:
            time.sleep(0.001)  # it comes before the last step

    return after_steps(act)

"""Run by torchrun: a phase of which one process is killed while something is written. Takes TYPE, a phase file, RANK and WHAT.

WHAT: ``segment`` of encoded rows, by a helper, ``take`` them, ``shard`` of log-probabilities, ``part`` of the traces
(half written), ``respond`` while another process writes.
"""

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from trainers import launch
from trainers.core import row_store, top_k
from trainers.core.examples import Steps
from trainers.ending import exit_with
from trainers.phases.rollout import run as rollout
from trainers.phases.rollout.parts import Parts

PLACES: dict[str, tuple[Any, str]] = {
    "segment": (row_store, "_named"),
    "take": (Steps, "batch"),
    "shard": (top_k, "write_shard"),
    "part": (Parts, "write"),
    "respond": (rollout, "respond"),
}
CALLS = {"segment": 1}
"""What is called this often, or three times, ends the process; a helper may have no more than one segment to write."""


def dying(inner: Callable[..., Any], what: str) -> Callable[..., Any]:
    rank, calls = os.getpid(), 0

    def call(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls < CALLS.get(what, 3):
            return inner(*args)
        if what == "part":
            (args[0].root / ".part-000000000-000000000.jsonl.1.tmp").write_text('{"prompt": ')
        os.kill(rank, signal.SIGKILL)
        return signal.pause()  # a helper is ended with the process that it helps

    return call


def main() -> int:
    torch.set_num_threads(1)
    kind, path, rank, what = sys.argv[1:]
    if os.environ["RANK"] == rank:
        place, name = PLACES[what]
        setattr(place, name, dying(getattr(place, name), what))
    return launch.run_phase(kind, Path(path), [])


if __name__ == "__main__":
    exit_with(main)

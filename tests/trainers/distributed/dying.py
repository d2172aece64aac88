"""Run by torchrun: a phase of which processes end after its third step. Takes TYPE, a phase file, and ``RANK=HOW`` for each.

HOW is a signal's or an error's name, after ``@SECONDS`` of waiting if it says so.
"""

import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch
from acting import after_steps

from trainers import launch
from trainers.contract import BadInput, Infrastructure
from trainers.core import presence
from trainers.ending import exit_with

ERRORS = {kind.__name__: kind for kind in (BadInput, Infrastructure, ValueError, torch.OutOfMemoryError)}
STEP = 3


def die(how: str) -> None:
    name, _, seconds = how.partition("@")
    time.sleep(float(seconds or 0))
    if name in ERRORS:
        raise ERRORS[name](f"of rank {os.environ['RANK']}")
    os.kill(os.getpid(), signal.Signals[name])


def main() -> int:
    torch.set_num_threads(1)
    kind, path, *dying = sys.argv[1:]
    how = dict(entry.split("=") for entry in dying).get(os.environ["RANK"])
    presence.MISSED = 4  # else a frozen one is waited for for two minutes

    def act(step: int, *_: Any) -> None:
        if step == STEP and how is not None:
            Path(path).with_suffix(".died").touch()
            die(how)

    with after_steps(act):
        return launch.run_phase(kind, Path(path), [])


if __name__ == "__main__":
    exit_with(main)

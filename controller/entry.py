"""Where `alignctl` starts. Imports nothing large, so that a Ctrl-C finds this before anything else."""

import os
import signal

INTERRUPTED = 130
"""What shells give a program that a Ctrl-C has ended."""


def main() -> None:
    """Until a command has something to tidy up, a Ctrl-C ends the process at once, without a word.

    As an exception it came out of imports as 40 lines, or was lost in pydantic's native code, which cannot raise everywhere: a
    run went on for all of its minutes. Nothing is left half written: a kill at any moment is provided for.
    """
    signal.signal(signal.SIGINT, _leave)
    from controller.cli import main as alignctl

    alignctl()


def _leave(*_: object) -> None:
    os._exit(INTERRUPTED)

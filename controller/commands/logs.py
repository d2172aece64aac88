"""`alignctl logs` of a workspace."""

import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from controller import runs_folder
from controller.api.problems import InvalidRun, Problem
from controller.api.status import RunStatus
from controller.api.text import for_terminal
from controller.backends.local import process
from controller.commands.find import find_run, interesting_phase


def logs_command(root: Path, run: str | None, phase: str | None, attempt: int | None, follow: bool) -> int:
    name = find_run(root, run)
    phase = phase or interesting_phase(runs_folder.read_status(root, name) or RunStatus())
    if phase is None:
        raise InvalidRun([Problem(name, "nothing has run yet, so there is no log")])
    directory = root / name / phase
    numbers = process.attempt_numbers(directory)
    if not numbers:
        known = sorted(p.parent.name for p in (root / name).glob("*/attempts") if p.is_dir())
        shown = f"phases with logs are: {', '.join(known)}" if known else "no phase has any"
        raise InvalidRun([Problem(directory.name, f"no log in run {name}; {shown}")])
    if attempt is not None and attempt not in numbers:
        raise InvalidRun([Problem(phase, f"no log of attempt {attempt}; attempts are: {', '.join(map(str, numbers))}")])
    if follow:
        for line in follow_lines(root, directory, attempt):
            print_line(line)
    else:
        print_line(process.log_file(directory, attempt or numbers[-1]).read_text(errors="replace"))
    return 0


def print_line(text: str) -> None:
    """A log is anyone's text: to a terminal it may not say more than that. Who reads it by a program gets it as it is."""
    print(for_terminal(text) if sys.stdout.isatty() else text, end="", flush=True)


def follow_lines(root: Path, directory: Path, attempt: int | None = None, poll: float = 0.3) -> Iterator[str]:
    """What is there and what comes, over further attempts unless one is named, until the run ends."""
    number, file = 0, None
    try:
        while True:
            active = runs_folder.holder(root) is not None
            newest = attempt or process.attempt_numbers(directory)[-1]
            if newest != number:
                if file is not None:
                    yield from file
                    file.close()
                number, file = newest, _open(process.log_file(directory, newest))
            assert file is not None
            yield from file
            if not active:
                return
            time.sleep(poll)
    finally:
        if file is not None:
            file.close()


def _open(path: Path) -> TextIO:
    return path.open(errors="replace")

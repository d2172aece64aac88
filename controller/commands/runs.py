"""`alignctl runs`: what a workspace holds, whether or not its runs are still there."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from controller import runs_folder
from controller.api.text import plain
from controller.commands.find import named
from controller.commands.say import say
from controller.holdings import Bucket, Files, Folder, HeldPhase, HeldRun, holdings
from controller.plan.verdict import duration
from trainers.contract import PhaseError
from trainers.remote.store import Store
from trainers.spec import is_address

WIDEST = 60
UNITS = ("B", "KB", "MB", "GB", "TB", "PB")

RUNS = ("run", "phases", "unfinished", "set aside", "last result", "work", "size")
PHASES = ("phase", "type", "state", "finished", "steps", "work", "size", "folder")


def runs_command(root: str, name: str | None) -> int:
    if name is not None and is_address(name):
        raise runs_folder.Unusable(f"RUN {name}: is no run's name; for what is there say --workspace {name}")
    with reading(root) as files:
        runs = holdings(files)
    if not runs:
        say(f"{root} holds nothing of any run")
    elif name is None:
        say_table(RUNS, map(run_row, runs))
    else:
        chosen = named(name, [run.name for run in runs], root)
        say_table(PHASES, phase_rows(next(run for run in runs if run.name == chosen)))
    return 0


@contextmanager
def reading(root: str) -> Iterator[Files]:
    """A folder, or an address in an object store. What is wrong with it is one line."""
    if not is_address(root):
        if not Path(root).is_dir():
            raise runs_folder.Unusable(f"--workspace {root}: is no folder, and no address such as s3://bucket/prefix")
        yield Folder(Path(root))
        return
    try:
        store = Store(root)
        store.check()
        yield Bucket(store)
    except PhaseError as error:
        raise runs_folder.Unusable(f"--workspace {error}") from error


def run_row(run: HeldRun) -> tuple[str, ...]:
    done = run.finished
    counts = (len(done), len(run.phases) - len(done), len(run.aside))
    return run.name, *(str(count or "-") for count in counts), run.last or "-", *cost(run.seconds, run.size)


def phase_rows(run: HeldRun) -> Iterator[tuple[str, ...]]:
    for phase in (*run.phases, *run.aside):
        steps = str(phase.result.steps) if phase.result else "-"
        spent = cost(phase.result.seconds if phase.result else 0.0, phase.size)
        yield phase.name, phase.type or "-", state(phase), phase.finished_at or "-", steps, *spent, phase.folder
    for other in run.others:
        said = ": ".join(filter(None, (str(other.state).lower(), str(other.failure or ""), other.message)))
        yield other.name, other.type, said, "-", "-", "-", "-", "-"


def state(phase: HeldPhase) -> str:
    if phase.result:
        return "set aside" if phase.aside else "finished"
    at = f", step {phase.step} of {phase.total_steps}" if phase.total_steps else ""
    failed = f", {phase.known.failure}: {phase.known.message}" if phase.known and phase.known.failure else ""
    return f"unfinished{', set aside' if phase.aside else ''}{at}{failed}"


def cost(seconds: float, size: int) -> tuple[str, str]:
    return duration(seconds) if seconds else "-", bytes_text(size) if size else "-"


def bytes_text(size: float) -> str:
    """`1.2 GB`"""
    unit = UNITS[0]
    for unit in UNITS:
        if size < 1000 or unit == UNITS[-1]:
            break
        size /= 1000
    return f"{size:.0f} {unit}" if unit == UNITS[0] else f"{size:.1f} {unit}"


def say_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Columns of plain text: names and messages are whoever's who wrote to the workspace."""
    table = [head, *([plain(cell, WIDEST) for cell in row] for row in rows)]
    widths = [max(len(row[i]) for row in table) for i in range(len(head))]
    for row in table:
        say("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())

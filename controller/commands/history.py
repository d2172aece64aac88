"""`alignctl history`: one page for people about everything that a workspace holds. Static: no scripts, nothing to fetch."""

import os
from collections.abc import Sequence
from datetime import UTC, datetime
from urllib.parse import quote

from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined

from controller import runs_folder
from controller.api.text import plain
from controller.commands.runs import bytes_text, cost, reading, state
from controller.commands.say import say
from controller.holdings import Bucket, Files, Folder, HeldPhase, HeldRun, holdings
from trainers.files import write_atomic
from trainers.phases.package import templating

PAGE = "history.html"
REPORT = "report.html"
SHOWN_METRICS = 6

ENVIRONMENT = Environment(
    # The report's own style.
    loader=ChoiceLoader([PackageLoader("controller.commands"), PackageLoader("trainers.phases.package")]),
    # All that is shown has been written by users, models and whoever may write to the workspace.
    autoescape=True,
    finalize=lambda value: plain(value) if type(value) is str else value,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
ENVIRONMENT.filters |= {"bytes": bytes_text, "cost": lambda seconds: cost(seconds, 0)[0], "number": templating.number}


def history_command(root: str) -> int:
    """Written into the workspace, so that it lies beside what it leads to."""
    with reading(root) as files:
        text = page(root, holdings(files), reports(files), datetime.now(UTC))
        address = _write(files, text)
    say(f"history: {address}")
    return 0


def _write(files: Files, text: str) -> str:
    if isinstance(files, Folder):
        try:
            write_atomic(files.root / PAGE, text)
        except OSError as error:
            raise runs_folder.Unusable(f"{files.root / PAGE}: cannot be written ({error.strerror})") from error
        return str(files.root / PAGE)
    assert isinstance(files, Bucket)
    files.store.write(PAGE, text.encode())
    return files.store.address(PAGE)


def page(root: str, runs: Sequence[HeldRun], reports: frozenset[str], now: datetime) -> str:
    return ENVIRONMENT.get_template("history.html.j2").render(
        root=root, runs=runs, now=f"{now:%Y-%m-%d %H:%M}", state=state, metrics=metrics, link=link, reports=reports
    )


def reports(files: Files) -> frozenset[str]:
    """Folders of phases with a report for people."""
    patterns = (f"*/*/{REPORT}", f"*/.history/*/{REPORT}")
    return frozenset(name.removesuffix(f"/{REPORT}") for pattern in patterns for name in files.names(pattern))


def link(phase: HeldPhase) -> str:
    """Relative to the page, whatever a folder is called."""
    return f"./{quote(os.fsencode(phase.folder))}/{REPORT}"


def metrics(phase: HeldPhase) -> list[tuple[str, float]]:
    return list(phase.result.metrics.items())[:SHOWN_METRICS] if phase.result else []

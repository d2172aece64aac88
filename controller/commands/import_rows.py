"""`alignctl import`: rows of a known format as JSONL in the project's schemas."""

from pathlib import Path

from controller.api.problems import InvalidRun, Problem, nearest
from controller.commands.say import say
from trainers.contract import BadInput
from trainers.formats import FORMATS
from trainers.formats.importer import Imported, import_rows


def import_command(name: str, source: str, target: Path, columns: list[str], skip: bool) -> int:
    if name not in FORMATS:
        known = ", ".join(FORMATS)
        raise InvalidRun([Problem("", f'"{name}" is not a format; formats are: {known}{nearest(name, FORMATS)}')])
    try:
        found = import_rows(name, source, target, dict(map(_rename, columns)), skip)
    except BadInput as error:
        raise InvalidRun([Problem("", str(error))]) from error
    except OSError as error:
        raise InvalidRun([Problem("", f"{error.filename or target}: {error.strerror}")]) from error
    say(_summary(target, found))
    return 0


def _rename(text: str) -> tuple[str, str]:
    key, equals, column = text.partition("=")
    if not (key and equals and column):
        raise InvalidRun([Problem("--column", f'"{text}" is not KEY=COLUMN, for example instruction=question')])
    return key, column


def _summary(target: Path, found: Imported) -> str:
    skipped = f", {len(found.skipped)} skipped; the first: {found.skipped[0]}" if found.skipped else ""
    return f"{target}: {found.rows} {found.schema} rows{skipped}"

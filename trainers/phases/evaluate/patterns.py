"""Users' regular expressions: refused early when they are none, and never given more than a moment for a text.

Python's matcher backtracks, so a pattern such as ``(a+)+$`` can take for ever on a text of forty letters. It looks for
signals while it does, so a timer ends it. (An engine without backtracking would read ``\\b`` and ``\\w`` as ASCII and
know no lookaround: patterns for other languages would be misread without a word.) Imports no torch.
"""

import re
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Annotated, NoReturn

from pydantic import AfterValidator

from trainers.contract import BadInput

SECONDS = 1.0
"""Computing time for a text; an ordinary pattern needs microseconds."""
BETWEEN_PAUSES = 8
"""Texts after which a request to stop is looked for, so that it is answered within seconds."""


def _compiles(pattern: str) -> str:
    try:
        re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        raise ValueError(f"{pattern[:200]!r} is not a regular expression: {error}") from error
    return pattern


Pattern = Annotated[str, AfterValidator(_compiles)]


def search_all(
    pattern: str, texts: Sequence[str], field: str, pause: Callable[[], None] = lambda: None
) -> list[re.Match[str] | None]:
    """The first match in each text.

    ``pause`` is called every few texts, in step on all processes. Raises BadInput, naming the ``field`` that holds the
    pattern, when a text takes longer than :data:`SECONDS`. For the main thread only.
    """
    compiled = re.compile(pattern)
    found = []
    with _alarm():
        for i, text in enumerate(texts):
            if i % BETWEEN_PAUSES == 0:
                pause()
            try:
                found.append(_search(compiled, text))
            except _OutOfTimeError as error:
                raise BadInput(
                    f"{field}: {pattern!r} takes longer than {SECONDS:g} s on the response {text[:60]!r}, because it "
                    "can match in too many ways; repeat nothing that is repeated inside, as in (a+)+"
                ) from error
    return found


class _OutOfTimeError(Exception):
    pass


def _search(pattern: re.Pattern[str], text: str) -> re.Match[str] | None:
    # The process's own time: how busy the machine is decides nothing.
    signal.setitimer(signal.ITIMER_VIRTUAL, SECONDS)
    try:
        return pattern.search(text)
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)


@contextmanager
def _alarm() -> Iterator[None]:
    before = signal.signal(signal.SIGVTALRM, _out_of_time)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


def _out_of_time(number: int, frame: FrameType | None) -> NoReturn:
    raise _OutOfTimeError

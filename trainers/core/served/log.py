"""Why a vLLM has ended, by its log. Imports no torch.

Its lines have the process, the level, the time and the place in front, in several forms over its versions:
`(EngineCore pid=7) ERROR 11-30 04:32:49 [core.py:1510] ValueError: …`. A process that dies writes a plain traceback as well, and
those that waited for it say that somebody else failed.
"""

import re
from collections.abc import Sequence as List
from dataclasses import dataclass
from pathlib import Path

LINE = re.compile(
    r"(?:\(.{1,60} pid=\d+(?:, [^)]{1,40})?\) ?)?"
    r"(?:(?P<level>DEBUG|INFO|WARNING|ERROR|CRITICAL) \d\d-\d\d \d\d:\d\d:\d\d \[[^\]]*\] ?)?"
    r"(?P<words>.*)"
)
EXCEPTION = re.compile(
    r"(?:[\w-]+\.)*\w*(?:Error|Exception)(?:: .*)?$|[\w./-]+: error: .*|\w+ proc \S+ died unexpectedly.*"
)
"""The last line of a traceback, what a program says of its arguments, and of a process that has said nothing itself."""

AT_WORK = re.compile(
    r"INFO: .* - \"[A-Z]+ \S+ HTTP/|Engine \d+: Avg |Route: /|INFO: +(?:Started server|Waiting for|Application |Finished server)"
)
"""What a server says while it does its work, and of an end that somebody else has brought about."""

ANSWERING = "Application startup complete"

SOMEBODY_ELSE = re.compile(r"root cause|initialization failed|EngineDeadError|stack trace", re.IGNORECASE)
ANOTHER = "During handling of the above exception, another exception occurred"
SEVERAL = re.compile(r"\d+ validation errors? for ")
"""What pydantic says, whose reason is on the next line."""

OF_MEMORY = re.compile(
    r"less than desired .*memory utilization|No available memory for the cache|larger than the available KV cache memory"
    r"|out of memory|OutOfMemoryError"
)
OF_IMPORT = re.compile(r"ModuleNotFoundError|No module named|cannot import name")

SILENCE = "it has said nothing"
NO_REASON = "its log has no error"

SIGNALS = 128
"""A shell whose program a signal has killed ends with this and the signal's number."""

MOST = 500


@dataclass(frozen=True)
class Said:
    level: str
    """Empty for what is no line of vLLM's logger."""
    words: str


def last_words(log: Path) -> str:
    """On one line: the error that the others come from, or else the last lines."""
    try:
        text = log.read_text(errors="replace")
    except OSError:
        return SILENCE
    lines = [_said(line) for line in text.splitlines() if line.strip()]
    if not lines:
        return SILENCE
    return (_cause(lines) or " / ".join(_last(lines)) or NO_REASON)[:MOST]


def is_of_memory(words: str) -> bool:
    """Whether what is said is that it may take too much memory, or too little."""
    return OF_MEMORY.search(words) is not None


def is_of_command(words: str, status: int) -> bool:
    """Whether what ended so before any answer was no vLLM, or one without what it imports."""
    if words == SILENCE:
        return 0 <= status <= SIGNALS
    return OF_IMPORT.search(words) is not None or (status == 0 and not EXCEPTION.match(words))


def _said(line: str) -> Said:
    found = LINE.match(line)
    assert found is not None
    return Said(found["level"] or "", found["words"].rstrip())


def _last(lines: List[Said]) -> list[str]:
    """The last lines, of those since it has answered if it has, without its daily work."""
    answering = max((i for i, line in enumerate(lines) if ANSWERING in line.words), default=-1)
    return [line.words.strip() for line in lines[answering + 1 :] if not AT_WORK.match(line.words)][-3:]


def _cause(lines: List[Said]) -> str:
    """Logged as an error before what a dying process writes: the first was before what it brought about."""
    logged = _exceptions([line for line in lines if line.level in ("ERROR", "CRITICAL")])
    plain = _exceptions([line for line in lines if not line.level])[::-1]
    found = [*logged, *plain]
    return next((words for words in found if not SOMEBODY_ELSE.search(words)), found[0] if found else "")


def _exceptions(lines: List[Said]) -> list[str]:
    found: list[str] = []
    for i, line in enumerate(lines):
        if line.words.startswith(ANOTHER):
            del found[-1:]
        elif EXCEPTION.match(line.words):
            reason = f" {lines[i + 1].words.strip()}" if SEVERAL.search(line.words) and i + 1 < len(lines) else ""
            found.append(line.words + reason)
    return found

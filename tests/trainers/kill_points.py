"""Processes that are killed, or frozen, at one of the things they do to files, whichever: before it, behind it, half-way."""

import builtins
import io
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

CHANGES = {"os.rename": 1, "os.link": 1, "os.remove": 0, "os.mkdir": 0, "os.rmdir": 0, "os.truncate": 0}
"""Events of Python's before something changes, and which of their arguments names it."""

CALLS = ((os, "fsync"), (os, "replace"), (os, "rename"), (os, "link"), (io, "open"), (builtins, "open"))
"""Behind these a process may be killed too."""


def operations(work: Callable[[Path], Any], folder: Path) -> list[str]:
    """What a process does to files below a folder. Fails if it does not come to its end."""
    status, seen = _forked(work, folder, None)
    assert status == 0, f"{status}: {seen}"
    return seen


def killed(work: Callable[[Path], Any], folder: Path, at: int) -> None:
    """Let a process do its work up to this operation. A file that is being put on disk there has half its content."""
    status, _ = _forked(work, folder, at)
    assert status == signal.SIGKILL, f"it ended by itself: {status}"


def frozen(work: Callable[[Path], Any], folder: Path, at: int, meanwhile: Callable[[], None]) -> int:
    """Stop a process at this operation, do something else, and let it go on. Its wait status."""
    child = os.fork()
    if child == 0:
        os._exit(_watched(work, folder, at, os.open(os.devnull, os.O_WRONLY), signal.SIGSTOP))
    _, status = os.waitpid(child, os.WUNTRACED)
    if os.WIFSTOPPED(status):
        meanwhile()
        os.kill(child, signal.SIGCONT)
        _, status = os.waitpid(child, 0)
    return status


def _forked(work: Callable[[Path], Any], folder: Path, at: int | None) -> tuple[int, list[str]]:
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os._exit(_watched(work, folder, at, writing))
    os.close(writing)
    with os.fdopen(reading) as found:
        seen = found.read().splitlines()
    return os.waitpid(child, 0)[1], seen


def _watched(
    work: Callable[[Path], Any], folder: Path, at: int | None, writing: int, sign: int = signal.SIGKILL
) -> int:
    try:
        points = _Points(folder, at, sign)
        work(folder)
        os.write(writing, "\n".join(points.seen).encode())
    except BaseException:
        os.write(writing, traceback.format_exc().encode())
        return 1
    return 0


class _Points:
    """This process's operations, at one of which it gets a signal."""

    def __init__(self, folder: Path, at: int | None, sign: int) -> None:
        self._folder, self._at, self._sign, self._busy = str(folder), at, sign, False
        self.seen: list[str] = []
        sys.addaudithook(self._before)
        for owner, name in CALLS:
            setattr(owner, name, self._followed(getattr(owner, name), name))

    def _before(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event in CHANGES:
            self._point(f"before {event}", arguments[CHANGES[event]])

    def _followed(self, inner: Callable[..., Any], name: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            path = os.readlink(f"/proc/self/fd/{args[0]}") if name == "fsync" else args[min(1, len(args) - 1)]
            if name == "fsync":
                self._point("within fsync", path)
            found = inner(*args, **kwargs)
            if name != "open":
                self._point(f"behind {name}", path)
            elif set(str(args[1] if len(args) > 1 else kwargs.get("mode", "r"))) & set("wax+"):
                self._point("behind open", args[0])
            return found

        return call

    def _point(self, what: str, path: Any) -> None:
        # Reports and signs of life come by the clock: with them an operation would have another number each time.
        timed = "progress.json" in str(path) or (threading.current_thread().name == "lease")
        if self._busy or timed or not str(path).startswith(self._folder):
            return
        self._busy = True
        self.seen.append(f"{what} {path}")
        if self._at is not None and len(self.seen) > self._at:
            self._at = None
            # What has another name too was put on disk under that one before.
            torn = self._sign == signal.SIGKILL and what == "within fsync" and os.path.isfile(path)
            if torn and os.stat(path).st_nlink == 1:
                os.truncate(path, os.path.getsize(path) // 2)
            os.kill(os.getpid(), self._sign)
        self._busy = False

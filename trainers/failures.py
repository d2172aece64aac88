"""How a phase ends: which failure an exception is, and the termination message. Imports no torch."""

import errno
import fcntl
import os
import re
import shutil
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import TextIO

from trainers.contract import (
    TERMINATION_VARIABLE,
    FailureClass,
    PhaseError,
    Termination,
    cause_rank,
    exit_status,
    termination_json,
)

OUT_OF_MEMORY = re.compile(
    r"out of memory|outofmemory|(can't|cannot|could not|failed to|unable to) allocate|not enough memory|bad_alloc"
    r"|_STATUS_ALLOC_FAILED|ErrorMemoryAllocation",
    re.IGNORECASE,
)
"""CUDA, HIP, MPS, XPU, cuBLAS, cuDNN, NCCL, DeepSpeed, numpy, the C++ runtime and the kernel say it in their own words."""

DISK_FULL = re.compile(
    r"no space left on device|disk quota exceeded|os error (28|122)\b|PytorchStreamWriter failed|file write failed"
    r"|unexpected pos \d+ vs \d+",
    re.IGNORECASE,
)
"""Writers in other languages (safetensors, torch's zip files) have no errno; the last three say it of any write that failed."""

NO_ROOM = (errno.ENOSPC, errno.EDQUOT)

BAD_NAMES = (errno.ENAMETOOLONG, errno.ELOOP)
"""Errors of paths that only the user can mend."""

NETWORK = ("DistBackendError", "DistNetworkError", "DistStoreError", "RendezvousError", "TransportError")
"""Names of exception types (torch's, httpx's) or of their bases."""

PEERS = re.compile(
    r"(gloo|nccl|ProcessGroup|TCPStore|socket).*(connect|timed out|timeout|closed|reset|refused|broken pipe)",
    re.I | re.S,
)


def classify(error: BaseException) -> FailureClass:
    """Which failure an exception is: its own class, or that of what it was raised from.

    Matches on names and texts where the type lives in a heavy package. A full disk counts whatever it was wrapped in.
    """
    if any(isinstance(e, OSError) and e.errno in NO_ROOM for e in chain(error)):
        return FailureClass.INFRASTRUCTURE
    found = [*map(_own_class, _causes(error)), *map(_lack, chain(error))]
    return next((failure for failure in found if failure is not None), FailureClass.INTERNAL)


def chain(error: BaseException | None) -> Iterator[BaseException]:
    """The error, those that it was raised from, and those in whose handling it was raised."""
    return _linked(error, lambda e: e.__cause__ or e.__context__)


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    return _linked(error, lambda e: e.__cause__)


def _linked(
    error: BaseException | None, following: Callable[[BaseException], BaseException | None]
) -> Iterator[BaseException]:
    """Errors one after the other. One that is kept and raised again can come after itself."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = following(error)


def _own_class(error: BaseException) -> FailureClass | None:
    if isinstance(error, PhaseError):
        return error.failure
    if (failure := _lack(error)) is not None:
        return failure
    if isinstance(error, OSError):
        return FailureClass.BAD_INPUT if error.errno in BAD_NAMES else FailureClass.INFRASTRUCTURE
    of_network = any(kind.__name__ in NETWORK for kind in type(error).__mro__)
    return FailureClass.INFRASTRUCTURE if of_network or PEERS.search(str(error)) else None


def _lack(error: BaseException) -> FailureClass | None:
    """Of memory or room on a disk: what is raised while either is cleaned up after hides nothing."""
    if isinstance(error, MemoryError) or OUT_OF_MEMORY.search(f"{type(error).__name__}: {error}"):
        return None if isinstance(error, PhaseError) else FailureClass.OUT_OF_MEMORY
    return FailureClass.INFRASTRUCTURE if is_disk_full(error) else None


def is_disk_full(error: BaseException) -> bool:
    """Whether it says that there is no room to write, in whatever words."""
    if isinstance(error, PhaseError):
        return False
    return (isinstance(error, OSError) and error.errno in NO_ROOM) or DISK_FULL.search(str(error)) is not None


def fail(error: Exception, termination: Termination, folder: Path | None) -> int:
    """Say why the phase fails, on stderr and in its termination message; its exit status.

    ``folder``: where it writes, for the message when there is no room left.
    """
    failure = classify(error)
    message = _message(error, folder)
    with suppress(OSError):  # the log may lie on the disk that is full
        if not isinstance(error, PhaseError):
            traceback.print_exception(error)
        print(f"{failure}: {message}", file=sys.stderr)
    terminate(termination.model_copy(update={"failure": failure, "message": message}))
    return exit_status(failure)


def _message(error: Exception, folder: Path | None) -> str:
    lines = str(error).strip().splitlines() or [""]
    full = next((e for e in chain(error) if is_disk_full(e)), None)
    if full is not None:
        return f"{no_room(full, folder)}; the phase goes on from its last checkpoint when there is room"
    return lines[0] if isinstance(error, PhaseError) else f"{type(error).__name__}: {lines[-1]}"


def no_room(error: BaseException, folder: Path | None) -> str:
    """The folder that is full (``folder`` where the error names none), how many bytes were needed and how many there are."""
    file = getattr(error, "filename2", None) or getattr(error, "filename", None)
    named = Path(os.fsdecode(file)).parent if isinstance(file, str | bytes) else None
    place = next((p for p in (named, folder) if p is not None), Path.cwd()).absolute()
    there = next(p for p in (place, *place.parents) if p.exists())
    usage = shutil.disk_usage(there)
    quota = " (a quota may end earlier)" if getattr(error, "errno", None) == errno.EDQUOT else ""
    needed = next((e.bytes_needed for e in chain(error) if hasattr(e, "bytes_needed")), None)
    wanted = f" {needed:,} bytes" if needed else ""
    return f"no space left to write{wanted} in {place}: {usage.free:,} of {usage.total:,} bytes are free{quota}"


def terminate(termination: Termination) -> bool:
    """Leave the termination message. Of several ranks' words that of the root cause stands, within a class the first one.

    False if one that stands already is kept.
    """
    path = os.environ.get(TERMINATION_VARIABLE)
    if path is None:
        return True
    # The exit status still tells the class. In a pod this path is a mounted file, which cannot be replaced.
    with suppress(OSError), open(path, "a+") as file:
        with suppress(OSError):  # there are file systems without locks
            fcntl.flock(file, fcntl.LOCK_EX)
        if _outweighs(termination, _said_before(file)):
            file.truncate(0)
            file.write(termination_json(termination))
            return True
        return False
    return True


def _said_before(file: TextIO) -> Termination | None:
    file.seek(0)
    try:
        return Termination.model_validate_json(file.read())
    except ValueError:
        return None


def _outweighs(ours: Termination, before: Termination | None) -> bool:
    if before is None or before.failure is None or ours.failure is None:
        return before is None or rank() == 0
    return cause_rank(ours.failure, ours.seen) < cause_rank(before.failure, before.seen)


def of_signal(number: int) -> tuple[FailureClass, str]:
    """(failure, message) of a process that a signal ended."""
    name = signal.Signals(number).name
    if number == signal.SIGKILL:
        return FailureClass.INFRASTRUCTURE, "killed by SIGKILL, which is how a machine out of memory ends a process"
    if number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        return FailureClass.INTERRUPTED, f"ended by {name} before it could save"
    return FailureClass.INTERNAL, f"crashed with {name}"


def rank() -> int:
    """This process's rank, known before torch is imported."""
    return int(os.environ.get("RANK", "0"))

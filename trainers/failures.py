"""How a phase ends: which failure an exception is, and the termination message. Imports no torch."""

import os
import sys
import traceback
from pathlib import Path

from trainers.contract import (
    TERMINATION_VARIABLE,
    FailureClass,
    PhaseError,
    Termination,
    exit_status,
    termination_json,
)


def classify(error: BaseException) -> FailureClass:
    """Which failure an exception is. Matches on type names where the type lives in a heavy package."""
    if isinstance(error, PhaseError):
        return error.failure
    text = str(error).lower()
    if (
        isinstance(error, MemoryError)
        or "outofmemory" in type(error).__name__.lower()
        or "can't allocate memory" in text
    ):
        return FailureClass.OUT_OF_MEMORY
    if type(error).__name__ in ("DistBackendError", "DistNetworkError", "DistStoreError"):
        return FailureClass.INFRASTRUCTURE
    if "gloo" in text and ("connection" in text or "timed out" in text):
        return FailureClass.INFRASTRUCTURE
    if isinstance(error, OSError):
        return FailureClass.INFRASTRUCTURE
    return FailureClass.INTERNAL


def fail(error: Exception, digest: str) -> int:
    failure = classify(error)
    lines = str(error).strip().splitlines() or [""]
    message = lines[0] if isinstance(error, PhaseError) else f"{type(error).__name__}: {lines[-1]}"
    if not isinstance(error, PhaseError):
        traceback.print_exception(error)
    print(f"{failure}: {message}", file=sys.stderr)
    terminate(Termination(failure=failure, message=message, digest=digest))
    return exit_status(failure)


def terminate(termination: Termination) -> None:
    """Leave the termination message. Rank 0's word counts; another rank speaks only if nothing has been said yet."""
    path = os.environ.get(TERMINATION_VARIABLE)
    if path is None:
        return
    target = Path(path)
    if rank() and target.exists() and target.stat().st_size:
        return
    # A plain write: in a pod this path is a mounted file, which cannot be replaced.
    target.write_text(termination_json(termination))


def rank() -> int:
    """This process's rank, known before torch is imported."""
    return int(os.environ.get("RANK", "0"))

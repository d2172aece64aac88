"""End a process without taking its interpreter apart. Imports no torch.

Libraries' threads (gloo's, the autograd engine's, a store's) go on until a process is gone. One that asks for the
interpreter's lock while the interpreter is taken apart is ended by Python in the middle of C++ code, which aborts the
process (before 3.14; python/cpython#87135): "terminate called without an active exception". A phase that has done all
its work would have crashed, and its launcher would begin an attempt anew.
"""

import atexit
import os
import sys
from collections.abc import Callable
from typing import NoReturn


def exit_with(main: Callable[[], int | None]) -> NoReturn:
    """Exit with the status that ``main`` returns or raises, once everything registered with ``atexit`` is done."""
    status = [1]  # of an exception that nobody catches

    def leave() -> None:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status[0])

    atexit.register(leave)  # what is registered first is called last
    try:
        sys.exit(main())
    except SystemExit as stop:
        status[0] = _status(stop)
        raise


def _status(stop: SystemExit) -> int:
    if isinstance(stop.code, int):
        return stop.code
    return 0 if stop.code is None else 1

"""End a process without taking its interpreter apart. Imports no torch.

Libraries' threads (gloo's, the autograd engine's, a store's) go on until a process is gone. One that asks for the
interpreter's lock while the interpreter is taken apart is ended by Python in the middle of C++ code, which aborts the
process (before 3.14; python/cpython#87135): "terminate called without an active exception". A phase that has done all
its work would have crashed, and its launcher would begin an attempt anew.
"""

import atexit
import os
import sys
import threading
from collections.abc import Callable
from typing import NoReturn

LINGER_SECONDS = 20.0
"""From a phase's last word to its end. A thread that writes a checkpoint may wait for a process that is gone, and its own
process would be waited for by those after it."""


def exit_with(main: Callable[[], int | None]) -> NoReturn:
    """Exit with the status that ``main`` returns or raises, once other threads are done and what ``atexit`` was told is, or
    some seconds later.
    """
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
    finally:
        late = threading.Timer(LINGER_SECONDS, leave)
        late.daemon = True
        late.start()


def _status(stop: SystemExit) -> int:
    if isinstance(stop.code, int):
        return stop.code
    return 0 if stop.code is None else 1

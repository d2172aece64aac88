"""`alignctl stop` of a workspace."""

import os
import signal
import time
from pathlib import Path

from controller import runs_folder
from controller.backends.local import process
from controller.commands.say import say


def stop_command(root: Path, timeout: float) -> int:
    """Ask the runner to stop, as Ctrl-C would, and wait; end what a killed runner left."""
    pid = runs_folder.holder(root)
    if pid:
        os.kill(pid, signal.SIGTERM)
        say(f"stopping process {pid}: unfinished work is being saved")
        if not _released(root, timeout):
            say(f"process {pid} has not ended within {timeout:g} s", err=True)
            return 1
    left = process.end_all(root, grace=timeout) if root.is_dir() else 0
    if not pid and not left:
        say(f"nothing runs in {root}")
    else:
        say("stopped; run it again to continue")
    return 0


def _released(root: Path, timeout: float) -> bool:
    """Wait for the lock and not for the process: a process whose parent does not look stays as a zombie."""
    end = time.monotonic() + timeout
    while runs_folder.holder(root) is not None:
        if time.monotonic() > end:
            return False
        time.sleep(0.1)
    return True

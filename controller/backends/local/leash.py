"""Starts a program that is asked to stop (SIGTERM) when its starter dies, however that dies.

Run as a script with `python -I -S`, so it costs a few milliseconds: `leash.py STARTER_PID PROGRAM [ARGUMENT...]`.
The wish for a signal survives exec, so afterwards nothing of this is left.
"""

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1

if __name__ == "__main__":
    starter, program = int(sys.argv[1]), sys.argv[2:]
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    # The starter may have died before the wish was made.
    if os.getppid() != starter:
        sys.exit(143)
    os.execvp(program[0], program)  # noqa: S606 -- the point of this file

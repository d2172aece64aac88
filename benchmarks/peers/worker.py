"""Does jobs, a line of JSON each on its standard input, in a process forked for each: what is imported is imported once.

python worker.py MODULE

The module has ``ready(job)``, which imports what this kind of job needs, and ``run(job)``. Memory is what a job takes above
all imports.
"""

import ctypes
import importlib
import json
import os
import resource
import signal
import sys
import time
import traceback
from typing import Any

MEGABYTE = 2**20
PR_SET_PDEATHSIG = 1


def main(name: str) -> None:
    _end_with_parent()
    answers, sys.stdout = sys.stdout, sys.stderr  # what libraries print is no answer
    began = time.process_time(), time.perf_counter()
    module = importlib.import_module(name)
    start = [time.process_time() - began[0], time.perf_counter() - began[1]]
    _say(answers, {"imports": start})
    for line in sys.stdin:
        reading, writing = os.pipe()
        if (child := os.fork()) == 0:
            _work(module, json.loads(line), writing)
        os.close(writing)
        with os.fdopen(reading) as pipe:
            found = pipe.read()
        _, status = os.waitpid(child, 0)
        _say(
            answers,
            json.loads(found) if found else {"error": f"its process ended with {os.waitstatus_to_exitcode(status)}"},
        )


def _work(module: Any, job: dict[str, Any], writing: int) -> None:
    """In the child, which ends here."""
    _end_with_parent()
    try:
        began = [time.process_time(), time.perf_counter()]
        module.ready(job)
        held = _resident()
        found = module.run(job)
        found |= {"began": began, "held": held, "peak": _peak(held)}
    except BaseException:  # noqa: BLE001 - whatever it was, the parent is to say so
        found = {"error": traceback.format_exc()[-2000:]}
    with os.fdopen(writing, "w") as pipe:
        json.dump(found, pipe)
    os._exit(0)


def _end_with_parent() -> None:
    """A phase that is asked to stop first finishes its step; nobody is there to hear of it."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _resident() -> float:
    """Megabytes of this process's memory now."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / MEGABYTE


def _peak(held: float) -> float:
    """Megabytes at most: of the GPU's memory where one was used, else of this process's above what it held."""
    cuda = sys.modules["torch"].cuda if "torch" in sys.modules else None
    if cuda is not None and cuda.is_initialized():
        return float(cuda.max_memory_allocated()) / MEGABYTE
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 2**10 / MEGABYTE - held


def _say(answers: Any, what: dict[str, Any]) -> None:
    answers.write(json.dumps(what) + "\n")
    answers.flush()


if __name__ == "__main__":
    main(sys.argv[1])

"""Does jobs, a line of JSON each on its standard input, in a process forked for each: what is imported is imported once.

python worker.py ours|theirs
"""

import importlib
import json
import os
import resource
import sys
import time
import traceback
from typing import Any


def main(side: str) -> None:
    answers, sys.stdout = sys.stdout, sys.stderr  # what libraries print is no answer
    began = time.process_time(), time.perf_counter()
    run = importlib.import_module(side).run
    start = [time.process_time() - began[0], time.perf_counter() - began[1]]
    _say(answers, {"imports": start})
    for line in sys.stdin:
        reading, writing = os.pipe()
        if (child := os.fork()) == 0:
            _work(run, json.loads(line), writing)
        os.close(writing)
        with os.fdopen(reading) as pipe:
            found = pipe.read()
        os.waitpid(child, 0)
        _say(answers, json.loads(found) if found else {"error": "it ended without an answer"})


def _work(run: Any, job: dict[str, Any], writing: int) -> None:
    """In the child, which ends here."""
    try:
        began = [time.process_time(), time.perf_counter()]
        found = run(job)
        found |= {"began": began, "peak": _peak()}
    except BaseException:  # noqa: BLE001 - whatever it was, the parent is to say so
        found = {"error": traceback.format_exc()[-2000:]}
    with os.fdopen(writing, "w") as pipe:
        json.dump(found, pipe)
    os._exit(0)


def _peak() -> float:
    """Megabytes: of the GPU's memory where one was used, else of this process's."""
    cuda = sys.modules["torch"].cuda
    return (
        cuda.max_memory_allocated()
        if cuda.is_initialized()
        else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 2**10
    ) / 2**20


def _say(answers: Any, what: dict[str, Any]) -> None:
    answers.write(json.dumps(what) + "\n")
    answers.flush()


if __name__ == "__main__":
    main(sys.argv[1])

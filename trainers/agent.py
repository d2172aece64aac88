"""torchrun, which also says why a process ended that could not: ``python -m trainers.agent OPTIONS -m trainers TYPE …``.

A process that is killed leaves no word, and those of its peers name what they met after it: a closed connection, or that they
were asked to stop. A node that loses power leaves no word at all (:mod:`trainers.nodes`).
"""

import os
import signal
import sys
from collections.abc import Mapping
from contextlib import suppress

import psutil
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.run import parse_args, run

from trainers.contract import FailureClass, Termination, exit_status
from trainers.failures import fail, of_signal, terminate
from trainers.nodes import SECONDS, watch


def main() -> int:
    options = parse_args(sys.argv[1:])
    if options.nnodes not in ("1", "1:1") and options.rdzv_backend == "static":
        watch(int(options.node_rank), options.master_addr, int(options.master_port) + 1, _lost)
    try:
        run(options)
    except ChildFailedError as error:
        return _of_processes(error)
    except SignalException as error:
        return _of_signal(error.sigval, "", seen=False)
    except Exception as error:  # noqa: BLE001 - of the rendezvous, which peers may have broken
        return fail(error, Termination(), None)
    return 0


def _of_processes(error: ChildFailedError) -> int:
    """Exit status of the first process that failed; its reason too, if it could not say it itself."""
    if (found := killed(error.failures)) is not None:
        return _of_signal(-error.failures[found].exitcode, f"rank {found}: ", seen=True)
    code: int = error.get_first_failure()[1].exitcode
    return code if code > 0 else 128 - code


def killed(failures: Mapping[int, ProcessFailure]) -> int | None:
    """The rank whose end by a signal was among the first that were seen, if one was.

    Times are in whole seconds, so a process and peers that fail after it can have the same. torchrun itself ends the others:
    by SIGTERM at once, by SIGKILL only later.
    """
    first = min(failure.timestamp for failure in failures.values())
    signals = {rank: -f.exitcode for rank, f in failures.items() if f.timestamp == first and f.exitcode < 0}
    ranks = [rank for rank, number in signals.items() if number != signal.SIGTERM]
    return min(ranks, key=lambda rank: (signals[rank] != signal.SIGKILL, rank), default=None)


def _lost(node: int) -> None:
    """End at once, from another thread: processes here wait for a node that will never answer."""
    message = f"node rank {node} has not answered for {SECONDS} s: its power or its network is gone"
    print(f"{FailureClass.INFRASTRUCTURE}: {message}", file=sys.stderr, flush=True)
    terminate(Termination(failure=FailureClass.INFRASTRUCTURE, message=message, seen=True, lost_node=node))
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            process.kill()
    os._exit(exit_status(FailureClass.INFRASTRUCTURE))


def _of_signal(number: int, who: str, seen: bool) -> int:
    failure, message = of_signal(number)
    said = Termination(failure=failure, message=f"{who}{message}", seen=seen)
    if terminate(said):  # else a process has said more: that it has saved its work, for example
        print(f"{failure}: {said.message}", file=sys.stderr)
    return exit_status(failure)


if __name__ == "__main__":
    sys.exit(main())

"""torchrun, which also says why a process ended that could not: ``python -m trainers.agent OPTIONS -m trainers TYPE …``.

A process that is killed leaves no word, and those of its peers name what they met after it: a closed connection, or that they
were asked to stop.
"""

import signal
import sys
from collections.abc import Mapping

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.run import parse_args, run

from trainers.contract import Termination, exit_status
from trainers.failures import fail, of_signal, terminate


def main() -> int:
    try:
        run(parse_args(sys.argv[1:]))
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


def _of_signal(number: int, who: str, seen: bool) -> int:
    failure, message = of_signal(number)
    print(f"{failure}: {who}{message}", file=sys.stderr)
    terminate(Termination(failure=failure, message=f"{who}{message}", seen=seen))
    return exit_status(failure)


if __name__ == "__main__":
    sys.exit(main())

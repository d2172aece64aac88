"""Processes tell each other that they are there, and end when one is not.

A collective waits for a process that is frozen, or whose machine has lost power, as it does for one that is at work, and
then names none. So each process counts up in the store through which they have met, in a thread of its own, and looks at
the count of the next one: whatever its main thread does, for however long, goes on being heard of.
"""

import faulthandler
import itertools
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from datetime import timedelta

from torch.distributed import PrefixStore, ProcessGroup, Store, TCPStore  # type: ignore[attr-defined]
from torch.distributed.distributed_c10d import _set_pg_timeout

from trainers.contract import FailureClass, Infrastructure, Termination, exit_status
from trainers.failures import terminate

EVERY_SECONDS = 5.0
MISSED = 24
"""Counts that may fail to come, two minutes: no machine stands still for so long and comes back, and no library is known
that keeps all of a process's threads waiting for it."""

REFUSED = 2
"""Exchanges in a row that a store refuses at once before it counts as gone: a connection that is closed stays so."""
GRACE = 2
"""Turns that a process has to fail by itself, and say more, after a peer has. Most meet a closed connection at once. Not
all: gloo has been seen to wait for ever in a collective of four processes of which two were gone."""

FAILED, DONE = "failed", "done"

PATIENCE = timedelta(hours=6)
"""How long collectives wait: longer than anything that one process does while others wait, such as preparing large data or
uploading. torch's 10 minutes for NCCL are not. A process of which the main thread alone hangs ends the others then;
sooner than that `failurePolicy.stallTimeoutSeconds` does."""

MEETING_SECONDS = 30.0
"""Until the launcher's store has to answer: it was there before the processes were."""

_groups = itertools.count()
"""Of one process, which may carry out several phases."""


def find_store(environ: Mapping[str, str]) -> None:
    """Raise Infrastructure if torchrun, which holds the store of its processes, is gone before they have met.

    Else each would try to reach it for as long as collectives may take.
    """
    if environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return None
    place, deadline = (environ["MASTER_ADDR"], int(environ["MASTER_PORT"])), time.monotonic() + MEETING_SECONDS
    while True:
        try:
            return socket.create_connection(place, timeout=EVERY_SECONDS).close()
        except OSError as error:
            if time.monotonic() > deadline:
                raise Infrastructure(f"torchrun is gone: nobody answers at {place[0]}:{place[1]} ({error})") from error
            time.sleep(min(1.0, MEETING_SECONDS / 10))


class Presence:
    """Of a process among ``world``. ``give_up`` is called, in a thread, when another one is gone: with what is known
    of it, and whether that is the cause or what followed it.
    """

    def __init__(self, rank: int, world: int, give_up: Callable[[str, bool], None]) -> None:
        self.rank, self.next = rank, (rank + 1) % world
        self.give_up = give_up
        self.store = PrefixStore(f"presence-{next(_groups)}", _store())
        self.heard = (0, b"")
        """Exchanges with the store, and the next process's count."""
        self.trouble = ""
        """What is known of a peer that has failed."""
        self.done = False
        self.closed = threading.Event()
        self.exchanging = threading.Thread(target=self._exchange, daemon=True)
        self.judging = threading.Thread(target=self._judge, daemon=True)
        self.exchanging.start()
        self.judging.start()

    def close(self) -> None:
        """Say that this process is done. Those before it wait no more."""
        self.done = True
        self._leave()

    def fail(self) -> None:
        """Say that this process ends without being done. No other one can go on without it."""
        self._leave()

    def _leave(self) -> None:
        """The thread that talks to the store says the last word: a store that is gone holds nobody else up."""
        self.closed.set()
        self.exchanging.join(EVERY_SECONDS)

    def _exchange(self) -> None:
        refused = 0
        for count in itertools.count(1):
            try:
                self._say_and_hear(count)
                refused = 0
            except RuntimeError:  # the judge misses the answer
                refused += 1
            if refused == REFUSED:
                self.trouble = "the store through which processes have met is gone, and the process that held it"
            if self.closed.wait(EVERY_SECONDS):
                break
        with suppress(RuntimeError):  # whoever holds the store may be done before
            self._say_last()

    def _say_last(self) -> None:
        if self.done:
            self.store.set(str(self.rank), DONE)
        else:
            self.store.compare_set(FAILED, "", str(self.rank))  # the first one stays named

    def _say_and_hear(self, count: int) -> None:
        self.store.set(str(self.rank), str(count))
        there = self.store.check([str(self.next)])
        self.heard = (count, self.store.get(str(self.next)) if there else b"")
        if self.store.check([FAILED]):
            self.trouble = f"rank {self.store.get(FAILED).decode()} has failed"

    def _judge(self) -> None:
        """Counts its own turns, not seconds: when all processes are frozen together, nobody is missed."""
        before, unanswered, unheard, troubled = self.heard, 0, 0, 0
        while not self.closed.wait(EVERY_SECONDS) and self.heard[1] != DONE.encode():
            unanswered = unanswered + 1 if self.heard[0] == before[0] else 0
            unheard = unheard + 1 if self.heard[1] == before[1] else 0
            troubled += bool(self.trouble)
            before = self.heard
            if unheard >= MISSED or troubled > GRACE:
                reason = self.trouble or self._missing(unanswered)
                self.fail()
                self.give_up(reason, not self.trouble)
                return

    def _missing(self, unanswered: int) -> str:
        # Nobody can tell in which of two turns the one and the other began.
        if 2 * unanswered >= MISSED:
            return f"the store through which processes have met has not answered for {MISSED * EVERY_SECONDS:.0f} s"
        silent = f"rank {self.next} has given no sign of life for {MISSED * EVERY_SECONDS:.0f} s"
        return f"{silent}: it is frozen, or its machine is gone"


def end_process(reason: str, is_cause: bool) -> None:
    """End this process, whose main thread may wait for a collective that never comes, and say why."""
    faulthandler.dump_traceback(sys.stderr)
    print(f"{FailureClass.INFRASTRUCTURE}: {reason}", file=sys.stderr, flush=True)
    terminate(Termination(failure=FailureClass.INFRASTRUCTURE, message=reason, seen=is_cause))
    os._exit(exit_status(FailureClass.INFRASTRUCTURE))


def be_patient(group: ProcessGroup) -> None:
    """For a group that others have made, with torch's time-out."""
    _set_pg_timeout(PATIENCE, group)


def _store() -> Store:
    """Where processes meet, by a connection of this one's own: that of the group may wait for long."""
    return TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)

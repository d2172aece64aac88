"""One writer in a phase's folder, whoever else still thinks that it is his. Imports no torch.

A writer has a folder of its own beside the phases, ``<run>/.writers/<phase>/<number>/``. What it writes begins there and
gets its place by one rename; what it removes goes there first (:mod:`trainers.files`). Who takes over makes a folder with
the next number and takes those before away: from then on a rename of theirs finds nothing, however late it comes. So
neither clocks nor the file system's locks decide who writes.

They do not decide who may take over either. A newer attempt of the same run may at once. Anybody else waits until the
holder has let go, has ended on this machine, or has not counted on for :data:`SILENT_SECONDS` of the waiting process's
own time.
"""

import errno
import os
import secrets
import shutil
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

from pydantic import ConfigDict

from trainers.contract import ATTEMPT_VARIABLE, RUN_UID_VARIABLE, Infrastructure, Interrupted
from trainers.files import drafts, fsync_directory
from trainers.spec import SpecModel

WRITERS = ".writers"
"""In a run's folder."""
OWNER, COUNT, RELEASED = "owner.json", "count", "released"

COUNT_SECONDS = 15.0
"""How often a holder shows that it is there."""
SILENT_SECONDS = 90.0
"""Longer than a client of a shared file system goes by what it has read before (NFS: 60 s)."""
PATIENCE_SECONDS = 600.0
"""How long a holder that is there is waited for: it may be saving a large model, because it was asked to stop."""
LOOK_SECONDS = 1.0
REMOVALS = 100

GONE = (errno.ENOENT, errno.ESTALE)
TAKEN = (errno.EEXIST, errno.ENOTEMPTY, *GONE)


class Superseded(Interrupted):
    """Another writer has the folder now: nothing of this one is kept from here on, and nothing has failed."""


class Held(Infrastructure):
    """Another writer has the folder, and is there."""


class Owner(SpecModel):
    """A writer, for others to judge and for people to read."""

    model_config = ConfigDict(extra="ignore")

    run: str = "unknown"
    uid: str = ""
    """Of the run's object in a cluster; none on one machine."""
    attempt: int = 0
    host: str = "unknown"
    machine: str = ""
    """Whose numbers of processes they are: every container has a process 1."""
    pid: int = 0
    began: int = 0
    """When the process did, in the kernel's own time."""
    mark: str = ""
    """Its own, whatever else is alike."""

    def __str__(self) -> str:
        attempt = f" attempt {self.attempt} (uid {self.uid})" if self.uid else ""
        return f"run {self.run}{attempt}, process {self.pid} on {self.host}"

    @property
    def has_ended(self) -> bool:
        """Whether that is certain: only of a process of this machine's can it be."""
        return bool(self.machine) and self.machine == _machine() and _began(self.pid) != self.began


def this_process(run: str, environ: Mapping[str, str] = os.environ) -> Owner:
    return Owner(
        run=run,
        uid=environ.get(RUN_UID_VARIABLE, ""),
        attempt=int(environ.get(ATTEMPT_VARIABLE, "0")),
        host=socket.gethostname(),
        machine=_machine(),
        pid=os.getpid(),
        began=_began(os.getpid()),
        mark=secrets.token_hex(8),
    )


def _machine() -> str:
    """A start of a kernel, and the container in it; empty where there is no telling."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _began(pid: int) -> int:
    """When a process began, in clock ticks since the kernel did; 0 of one that has ended. Nobody's clock is asked."""
    try:
        state, *rest = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
    except OSError:
        return 0
    return 0 if state == b"Z" else int(rest[18])


class Record(SpecModel):
    """What stands in a lease."""

    model_config = ConfigDict(extra="ignore")

    number: int
    owner: Owner
    count: int = 0
    released: bool = False


class Waiting:
    """What a newcomer knows of the holder, by its own clock."""

    def __init__(self, owner: Owner, patience: float) -> None:
        self.owner, self.patience = owner, patience
        self._began = self._since = time.monotonic()
        self._seen: tuple[int, str, int] | None = None

    def may_take(self, found: Record) -> bool:
        """Whether the lease is free. Raises Superseded if a newer attempt has had it, Held when patience is at its end."""
        holder = found.owner
        same = bool(holder.uid) and holder.uid == self.owner.uid
        if same and holder.attempt > self.owner.attempt:
            raise superseded(holder)
        if found.released or holder.has_ended or (same and holder.attempt < self.owner.attempt):
            return True
        now, sign = time.monotonic(), (found.number, holder.mark, found.count)
        if sign != self._seen:
            self._tell(holder)
            self._seen, self._since = sign, now
        if now - self._since >= SILENT_SECONDS:
            return True
        if now - self._began >= self.patience:
            raise Held(f"{holder} is writing to this phase's folder: end it, or give one of the runs another name")
        return False

    def _tell(self, holder: Owner) -> None:
        if self._seen is None and self.patience:
            print(f"waiting for {holder}, which may still write to this phase's folder", file=sys.stderr, flush=True)


def superseded(by: Owner) -> Superseded:
    return Superseded(f"superseded: {by} has taken over this phase's folder; from then on nothing of this one is kept")


class Lease:
    """Taken by entering it, if it is not held yet. Leaving it lets go.

    Whatever it is left with, if it was lost before: Superseded is raised from that.
    """

    def __init__(self, owner: Owner, patience: float = PATIENCE_SECONDS) -> None:
        self.owner, self.patience = owner, patience
        self.number = 0
        self.when_lost: Callable[[], None] = lambda: None
        """Called in a thread."""
        self._holds = False
        self._left = threading.Event()

    def acquire(self) -> None:
        waiting = Waiting(self.owner, self.patience)
        while not self._try(waiting):
            time.sleep(min(LOOK_SECONDS, self.patience))
        self._holds = True
        threading.Thread(target=self._count_on, name="lease", daemon=True).start()

    def check(self) -> None:
        """Raise Superseded if it is another writer's now."""
        raise NotImplementedError

    def _try(self, waiting: Waiting) -> bool:
        raise NotImplementedError

    def _count(self, count: int) -> None:
        """Show that this writer is there. Raises Superseded."""
        raise NotImplementedError

    def _release(self) -> None:
        raise NotImplementedError

    def _count_on(self) -> None:
        count = 0
        while not self._left.wait(COUNT_SECONDS):
            count += 1
            try:
                self._count(count)
            except Superseded as lost:
                print(lost, file=sys.stderr, flush=True)
                self.when_lost()
                return
            except (OSError, Infrastructure):  # it may pass
                continue

    def __enter__(self) -> Self:
        if not self.number:
            self.acquire()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._left.set()
        if isinstance(error, Exception):
            self._explain(error)
        if self._holds:
            with suppress(OSError, Infrastructure, Superseded):
                self._release()

    def _explain(self, error: Exception) -> None:
        try:
            self.check()
        except Superseded as lost:
            raise lost from error
        except Exception:  # noqa: BLE001 -- a store that does not answer: the error itself says more
            return


class FolderLease(Lease):
    """Of a phase's folder on a file system, which several machines may share."""

    def __init__(self, root: Path, owner: Owner, patience: float = PATIENCE_SECONDS) -> None:
        super().__init__(owner, patience)
        self.root = Path(os.path.abspath(root))
        self.place = self.root.parent / WRITERS / self.root.name

    @property
    def own(self) -> Path:
        return self.place / f"{self.number:08d}"

    def join(self, number: int) -> None:
        """Write as the process of this job that has the lease."""
        self.number = number
        drafts[self.root] = self.own

    def check(self) -> None:
        try:
            os.close(os.open(self.own, os.O_RDONLY))  # unlike a look at it, this asks the server
        except OSError as error:
            if error.errno in GONE:
                raise superseded(self._record(self._newest()).owner) from error
            raise

    def _try(self, waiting: Waiting) -> bool:
        newest = self._newest()
        if newest and not waiting.may_take(self._record(newest)):
            return False
        return self._claim(newest + 1)

    def _claim(self, number: int) -> bool:
        """Take this number. False if somebody was first, or has gone on to a higher one: all look again behind their claim."""
        fresh, claimed = self.place / f".{secrets.token_hex(8)}", self.place / f"{number:08d}"
        fresh.mkdir(parents=True)
        try:
            (fresh / COUNT).write_text("0")
            (fresh / OWNER).write_text(self.owner.model_dump_json(by_alias=True))
            os.rename(fresh, claimed)  # a folder with something in it is not replaced
        except OSError as error:
            shutil.rmtree(fresh, ignore_errors=True)
            if error.errno in TAKEN:
                return False
            raise
        fsync_directory(self.place)
        if self._newest() > number:
            shutil.rmtree(claimed, ignore_errors=True)
            return False
        self.join(number)
        self._take_away_others()
        return True

    def _take_away_others(self) -> None:
        """Of writers before, and of those who were killed at this. By now this one may be late itself: none of later ones."""
        for folder in list(self.place.iterdir()):
            if not folder.name.isdecimal() or int(folder.name) < self.number:
                gone = self.place / f".{secrets.token_hex(8)}"
                with suppress(FileNotFoundError):
                    os.rename(folder, gone)
                _remove(gone)

    def _count(self, count: int) -> None:
        try:
            with (self.own / COUNT).open("r+") as file:  # makes none
                file.write(str(count))
        except OSError:
            self.check()
            raise

    def _release(self) -> None:
        """The folder stays: numbers go on from it."""
        for path in self.own.iterdir():
            if path.name not in (OWNER, COUNT):
                _remove(path)
        (self.own / RELEASED).touch()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        drafts.pop(self.root, None)
        super().__exit__(kind, error, trace)

    def _newest(self) -> int:
        try:
            return max((int(name) for name in os.listdir(self.place) if name.isdecimal()), default=0)
        except FileNotFoundError:
            return 0

    def _record(self, number: int) -> Record:
        """Of one that cannot be read, or has just gone, nothing is known."""
        folder = self.place / f"{number:08d}"
        try:
            owner = Owner.model_validate_json((folder / OWNER).read_text())
            count = int((folder / COUNT).read_text())
        except (OSError, ValueError):
            return Record(number=number, owner=Owner())
        return Record(number=number, owner=owner, count=count, released=(folder / RELEASED).exists())


def _remove(path: Path) -> None:
    """To the end: another machine that has a folder open can write to it until it is empty and gone."""
    for _ in range(REMOVALS):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
        if not path.exists():
            return
    shutil.rmtree(path)

"""One writer in a phase's folder on an object store. Imports no torch.

The lease is an object, ``<run>/.writers/<phase>.json``, that is written only where it still is what was read
(:meth:`trainers.remote.store.Store.swap`). Before anything else is written, copied or deleted, it is looked at. What says
that work is whole, a result or a checkpoint's manifest, replaces nothing: so a writer that is late between that look and
its word comes too late.
"""

import threading
from types import TracebackType

from trainers.contract import Infrastructure
from trainers.lease import PATIENCE_SECONDS, Lease, Owner, Record, Superseded, Waiting, superseded
from trainers.remote.store import Store


class StoreLease(Lease):
    def __init__(self, store: Store, name: str, owner: Owner, patience: float = PATIENCE_SECONDS) -> None:
        super().__init__(owner, patience)
        self.store, self.name = store, name
        self._tag = ""
        """Of the object as this writer wrote it last."""
        self._one_at_a_time = threading.Lock()

    def check(self) -> None:
        with self._one_at_a_time:
            if self.store.tag(self.name) == self._tag:
                return
        raise self._lost()

    def _try(self, waiting: Waiting) -> bool:
        tag, found = self._read()
        if found is not None and not waiting.may_take(found):
            return False
        self.number = found.number + 1 if found is not None else 1
        if not self._write(tag):
            return False
        self.store.guard = self.check
        return True

    def _count(self, count: int) -> None:
        self._write_on(count=count)

    def _release(self) -> None:
        self.store.guard = None
        self._write_on(released=True)

    def _explain(self, error: Exception) -> None:
        """Whoever writes late has been told by the guard."""

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # A store that does not answer is not asked once more.
        self._holds = self._holds and not isinstance(error, Infrastructure)
        super().__exit__(kind, error, trace)

    def _write_on(self, count: int = 0, released: bool = False) -> None:
        with self._one_at_a_time:
            if self._write(self._tag, count, released):
                return
        raise self._lost()

    def _write(self, tag: str | None, count: int = 0, released: bool = False) -> bool:
        record = Record(number=self.number, owner=self.owner, count=count, released=released)
        written = self.store.swap(self.name, record.model_dump_json(by_alias=True).encode(), tag)
        self._tag = written or self._tag
        return written is not None

    def _read(self) -> tuple[str | None, Record | None]:
        """Of one that cannot be read nothing is known."""
        # A list first: what keeps it from being read is said in an answer that has a body.
        tag = self.store.tag(self.name) if self.store.find(self.name) else None
        content = self.store.read(self.name) if tag is not None else None
        if content is None:
            return None, None
        try:
            return tag, Record.model_validate_json(content)
        except ValueError:
            return tag, Record(number=0, owner=Owner())

    def _lost(self) -> Superseded:
        found = self._read()[1]
        return superseded(found.owner if found is not None else Owner())

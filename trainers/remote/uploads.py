"""What rank 0 of a phase puts into an object store: unfinished work while it runs, the result at its end.

Uploads run in a thread, one after the other, so that training goes on. Imports no torch.
"""

import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType

from trainers.contract import Infrastructure, Interrupted
from trainers.remote.phase import CELLS, RemotePhase

NOT_UPLOADED = ("result.json", "progress.json", "phase.json", "identity.json", "checkpoints", "attempts", "wandb")
"""Goes last, is for this machine only, or is there already."""


class Uploads:
    """Use it as a context: leaving it waits for what is under way."""

    def __init__(self, phase: RemotePhase, inputs: tuple[Path, ...]) -> None:
        self.phase, self.store, self.dir = phase, phase.store, phase.dir
        self.inputs = inputs
        self._thread = ThreadPoolExecutor(1, "uploads")
        self._last: Future[None] | None = None
        self._sent: dict[str, tuple[int, int]] = {}

    def __enter__(self) -> "Uploads":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.flush()
        except Exception as problem:
            if error is None or isinstance(error, Interrupted):  # "the work is saved" would not be true
                raise
            print(f"unfinished work was not uploaded: {problem}", file=sys.stderr)
        finally:
            self._thread.shutdown()

    def keep(self, path: Path) -> None:
        """Put a file that is whole, and the metrics so far, into the store.

        Waits for the upload before it, so whatever was kept before this call is in the store when it returns.
        Raises what the upload before failed with.
        """
        self.wait()
        self._last = self._thread.submit(self._keep, path)

    def send_metrics(self) -> None:
        """Put the metrics so far into the store, from any thread."""
        self._thread.submit(self._upload, [self.dir.metrics, self.dir.wandb]).result()

    def flush(self) -> None:
        """Wait until all that was kept, and the metrics, are in the store. Raises what an upload failed with."""
        self.keep(self.dir.metrics)
        self.wait()

    def fetch_cell(self, path: Path) -> None:
        """Fetch an evaluation's cell from wherever in the workspace it lies, if it does."""
        for folder in self.phase.indexed(path.name):
            name = f"{folder}/{CELLS}/{path.name}"
            if found := self.store.find(name):
                self.store.download({name: path}, found)
                return

    def finish(self) -> None:
        """Put everything into the store that is not there yet, the artifact before the result."""
        self.wait()
        self._upload(list(self._files()))
        self._drop_leftovers()
        self.phase.mark(self.phase.digest, self.phase.name)
        self.store.create(f"{self.phase.name}/result.json", self.dir.result.read_bytes())

    def wait(self) -> None:
        """Wait for what is under way. Raises what it failed with."""
        last, self._last = self._last, None
        if last is not None:
            last.result()

    def _keep(self, path: Path) -> None:
        self._upload([self.dir.metrics, self.dir.wandb, path])
        if path.parent.name == CELLS:
            self.phase.mark(path.name, self.phase.name)

    def _upload(self, paths: list[Path]) -> None:
        """Upload files that have changed since they were last sent."""
        marks = {self.phase.name_of(path): (path, _mark(path)) for path in paths if path.exists()}
        changed = {name: found for name, found in marks.items() if self._sent.get(name) != found[1]}
        linked = {name: source for name, (path, _) in changed.items() if (source := self._linked(path)) is not None}
        self.store.copy({source: name for name, source in linked.items()})
        self.store.upload({name: path for name, (path, _) in changed.items() if name not in linked})
        self._sent |= {name: mark for name, (_, mark) in changed.items()}

    def _linked(self, path: Path) -> str | None:
        """The object of an input's file that this one is a hard link to: packaged models go no second way."""
        stat = path.stat()
        if stat.st_nlink == 1:
            return None
        files = (file for root in self.inputs for file in root.rglob(path.name))
        return next((self.phase.name_of(file) for file in files if file.samefile(path)), None)

    def _files(self) -> Iterator[Path]:
        for path in sorted(self.dir.root.rglob("*")):
            parts = path.relative_to(self.dir.root).parts
            if path.is_file() and parts[0] not in NOT_UPLOADED and not any(map(_is_temporary, parts)):
                yield path

    def _drop_leftovers(self) -> None:
        """Delete what an attempt that was killed in :meth:`finish` left in the artifact: its size would be wrong."""
        result = self.dir.read_result()
        if result is None:
            raise Infrastructure(f"{self.dir.result} is gone")
        for artifact in result.artifacts.values():
            there = self.store.find(f"{self.phase.name}/{artifact.path}")
            self.store.delete(name for name in there if not (self.phase.workspace / name).exists())


def _is_temporary(name: str) -> bool:
    """A file or folder that a killed writer left."""
    return name.startswith(".") and name.endswith((".tmp", ".old", ".part"))


def _mark(path: Path) -> tuple[int, int]:
    stat = path.stat()
    return stat.st_size, stat.st_mtime_ns

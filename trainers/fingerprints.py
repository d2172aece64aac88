"""Identity of the rows a data source yields, and of models in folders, without reading them as such. Imports no torch."""

import glob
import hashlib
import importlib.metadata
import inspect
import json
import os
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cache, partial
from pathlib import Path

from trainers.contract import BadInput, canonical_json, sha256_text
from trainers.files import locked, read_into, write_atomic
from trainers.spec import DataSource, HubDataset

BLOCK = 64 * 2**20
"""Bytes of a file that are hashed by themselves: one processor would take ten seconds or more for 10 GB."""

CHUNK = 2**18

SETTLED_SECONDS = 2.0
"""A file that was written this short a time ago could be written once more without its time changing."""


def source_files(pattern: str, base_dir: Path) -> list[Path]:
    """Files that a path or glob means, sorted; relative ones start at ``base_dir``.

    Raises BadInput if there is none.
    """
    path = base_dir / pattern
    try:
        found = [path] if path.is_file() else sorted(Path(p) for p in glob.glob(str(path), recursive=True))
        files = [p for p in found if p.is_file()]
    except OSError as error:  # a name that no file can have, a folder that may not be read
        raise BadInput(f"{pattern!r} cannot be looked up: {error.strerror}") from error
    if not files:
        raise BadInput(_no_file(path) or f"no file matches {pattern!r} in {base_dir.resolve()}")
    return files


def _no_file(path: Path) -> str | None:
    """What lies in a file's place. Pipes and devices have no content that could be read twice, or that ends."""
    if path.is_dir():
        return f"{path} is a folder; name its files, for example {path}/*.jsonl"
    return f"{path} is no regular file, but a pipe, socket or device" if path.exists() else None


def fingerprint(source: DataSource, base_dir: Path) -> str:
    """SHA-256 over the files' contents; for hub data over what was asked for; for synthetic data also over the code."""
    if source.files is not None:
        return files_fingerprint(source_files(source.files, base_dir))
    content = _generator_code(source.synthetic.task) if source.synthetic else ""
    asked = source.document(exclude={"epochs", "weight"})
    if source.hub is not None and (folder := hub_folder(source.hub, base_dir)) is not None:
        content = folder_fingerprint(folder)
        asked["hub"]["name"] = _below(folder, base_dir)
    return sha256_text(canonical_json([asked, content]))


def hub_folder(data: HubDataset, base_dir: Path) -> Path | None:
    """The local folder that it names, from ``base_dir`` on: `datasets` loads it by the same key."""
    folder = base_dir / data.name
    return folder if folder.is_dir() else None


def _below(folder: Path, base_dir: Path) -> str:
    """As a file of a run names it: its rows are the same wherever both lie."""
    given, base = os.path.abspath(folder), os.path.abspath(base_dir)
    return os.path.relpath(given, base) if given.startswith(f"{base}/") else given


def _generator_code(task: str) -> str:
    """Digest of a generator's source, so that mending a generator is seen as a change of its data."""
    from trainers.synthetic import TASKS

    if task not in TASKS:
        raise BadInput(f"unknown synthetic task {task!r}; known tasks: {', '.join(TASKS)}")
    return files_fingerprint([Path(inspect.getfile(TASKS[task]))])  # type: ignore[arg-type]


def files_fingerprint(files: list[Path]) -> str:
    """SHA-256 over the files' digests (:func:`_digest`)."""
    digest = hashlib.sha256()
    for path in files:
        digest.update(_file_digest(path))
    return digest.hexdigest()


def _file_digest(path: Path) -> bytes:
    """Phases of a run often read the same data: one process reads a file once, unless it was written just now."""
    stat = path.stat()
    if time.time() - stat.st_mtime < SETTLED_SECONDS:
        return _digest(path, stat.st_size)
    if stat.st_size <= BLOCK:
        return _known(path, stat.st_size, stat.st_mtime_ns, stat.st_ino)
    return _known_to_all(path, stat.st_size, stat.st_mtime_ns, stat.st_ino)


@cache
def _known(path: Path, size: int, *marks: int) -> bytes:
    return _digest(path, size)


@cache
def _known_to_all(path: Path, size: int, *marks: int) -> bytes:
    """A large file's digest, which the processes of a machine find out once: the others wait for the first."""
    known = canonical_json([size, *marks])
    memory = _cache() / f"{sha256_text(str(path.resolve()))}.json"
    try:
        with locked(memory.with_suffix(".lock")):
            if (found := _remembered(memory, known)) is None:
                found = _digest(path, size).hex()
                write_atomic(memory, json.dumps({"marks": known, "fingerprint": found}))
            return bytes.fromhex(found)
    except OSError:  # a cache that cannot be written is only slow
        return _digest(path, size)


def _digest(path: Path, size: int) -> bytes:
    """SHA-256 of a file; of one larger than :data:`BLOCK` over its blocks' SHA-256, which all processors find out."""
    if size <= BLOCK:
        return _block_digest(path, 0)
    with ThreadPoolExecutor(16) as threads:
        return hashlib.sha256(b"".join(threads.map(partial(_block_digest, path), range(0, size, BLOCK)))).digest()


def _block_digest(path: Path, offset: int) -> bytes:
    digest = hashlib.sha256()
    chunk = memoryview(bytearray(CHUNK))  # one for all: new memory is cleared by the system first
    with path.open("rb", buffering=0) as file:
        for start in range(offset, offset + BLOCK, CHUNK):
            part = chunk[: offset + BLOCK - start]
            size = read_into(file.fileno(), part, start)
            digest.update(part[:size])
            if size < len(part):
                break
    return digest.digest()


def folder_fingerprint(folder: Path) -> str:
    """SHA-256 over the names and contents of a model folder's files; hidden ones (a clone's history) do not count.

    Remembered by the files' sizes and times: a large model would take a minute to read.
    """
    files = sorted(path for path in folder.rglob("*") if path.is_file() and not _hidden(path, folder))
    stats = [(path.relative_to(folder).as_posix(), path.stat()) for path in files]
    marks = canonical_json([[name, stat.st_size, stat.st_mtime_ns, stat.st_ino] for name, stat in stats])
    memory = _cache() / f"{sha256_text(str(folder.resolve()))}.json"
    if (known := _remembered(memory, marks)) is not None:
        return known
    contents = [hashlib.sha256(f"{name}\0{stat.st_size}\0".encode()).hexdigest() for name, stat in stats]
    found = sha256_text("".join([*contents, files_fingerprint(files)]))
    if all(time.time() - stat.st_mtime > SETTLED_SECONDS for _, stat in stats):
        with suppress(OSError):  # a cache that cannot be written is only slow
            write_atomic(memory, json.dumps({"marks": marks, "fingerprint": found}))
    return found


def package_version(name: str) -> str:
    """Identity of a model that comes in a Python package."""
    try:
        return f"{name} {importlib.metadata.version(name)}"
    except importlib.metadata.PackageNotFoundError:
        return name  # the phase tells how to install it


def _hidden(path: Path, folder: Path) -> bool:
    return any(part.startswith(".") for part in path.relative_to(folder).parts)


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "alignment" / "fingerprints"


def _remembered(memory: Path, marks: str) -> str | None:
    try:
        document = json.loads(memory.read_text())
        return str(document["fingerprint"]) if document["marks"] == marks else None
    except (OSError, ValueError, KeyError, TypeError):
        return None

"""Writing that is whole or not at all, and the identity of what lies on disk. Imports no torch."""

import fcntl
import hashlib
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

LEFTOVER = re.compile(r"\.(.+)\.\d+\.tmp")
"""Names of files that :func:`replaced` writes; of which file, in a group."""


def fsync_directory(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


@contextmanager
def room_for(num_bytes: int) -> Iterator[None]:
    """Note on what is raised meanwhile how many bytes were to be written: for the message if there is no room."""
    try:
        yield
    except Exception as error:
        vars(error).setdefault("bytes_needed", num_bytes)
        raise


def fsync_file(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def empty_directory(path: Path) -> None:
    """Make it, without what a killed writer left in it."""
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(parents=True)


def write_atomic(path: Path, content: str | bytes) -> None:
    """Write a file so that a reader, or a crash at any moment, sees the old content or the new, never a part."""
    data = content.encode() if isinstance(content, str) else content
    with room_for(len(data)), replaced(path) as file:
        file.write(data)


@contextmanager
def replaced(path: Path) -> Iterator[IO[bytes]]:
    """The same of a file that is written bit by bit: it gets its name at the end, or nothing of it is left."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)  # what a full disk cut off must not fill it further
        raise
    fsync_directory(path.parent)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold a lock that one process of this machine has at a time; it ends with the process, however that ends."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextmanager
def new_directory(final: Path) -> Iterator[Path]:
    """An empty folder to be filled, which gets the name ``final`` at the end; without one, nothing of it is left."""
    temporary = final.with_name(f".{final.name}.tmp")
    empty_directory(temporary)
    try:
        yield temporary
        commit_directory(temporary, final)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)  # what a full disk cut off must not fill it further
        raise


def commit_directory(temporary: Path, final: Path) -> None:
    """Give a finished directory its name. What is in it is flushed first, so the name never points at torn content.

    An older directory of that name is kept until the new one is in place, whenever this is killed.
    """
    for path in (temporary, *temporary.rglob("*")):
        if path.is_dir():
            fsync_directory(path)
        elif path.is_file():
            fsync_file(path)
    displaced = final.with_name(f".{final.name}.old")
    if final.exists():
        shutil.rmtree(displaced, ignore_errors=True)
        os.replace(final, displaced)
    os.replace(temporary, final)
    fsync_directory(final.parent)
    shutil.rmtree(displaced, ignore_errors=True)


def read_into(file: int, buffer: memoryview, offset: int) -> int:
    """Bytes of an open file from ``offset`` on, as many as there are room for; their number."""
    size = 0
    while size < len(buffer) and (found := os.preadv(file, [buffer[size:]], offset + size)):
        size += found
    return size


def tree_digest(root: Path) -> str:
    """SHA-256 over the relative names and contents of all files below ``root`` (or of one file)."""
    digest = hashlib.sha256()
    files = [root] if root.is_file() else sorted(p for p in root.rglob("*") if p.is_file())
    for path in files:
        name = path.name if path == root else path.relative_to(root).as_posix()
        digest.update(f"{name}\0{path.stat().st_size}\0".encode())
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def tree_size(root: Path) -> int:
    """Bytes in all files below ``root`` (or in one file)."""
    files = [root] if root.is_file() else root.rglob("*")
    return sum(path.stat().st_size for path in files if path.is_file())


def link_or_copy(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)

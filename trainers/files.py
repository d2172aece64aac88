"""Writing that is whole or not at all, and the identity of what lies on disk. Imports no torch."""

import fcntl
import hashlib
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TextIO

LEFTOVER = re.compile(r"\.(.+)\.[0-9a-f]+\.tmp")
"""Names of files that :func:`replaced` writes where nobody has a lease; of which file, in a group."""

drafts: dict[Path, Path] = {}
"""Folders that have one writer, and the folder that is its own (:mod:`trainers.lease`). What is written into them begins
there, and what is removed from them goes there first: whoever takes a writer's own folder away ends both at once."""


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
    """Make it, without what a killed writer left in it. A writer's own folder that was taken away is not made again."""
    shutil.rmtree(path, ignore_errors=True)
    if path.parent not in drafts.values():
        path.parent.mkdir(parents=True, exist_ok=True)
    path.mkdir()


def own_folder(path: Path) -> Path | None:
    """Where what becomes this begins, if it lies in a folder that has one writer."""
    absolute = Path(os.path.abspath(path))
    return next((own for root, own in drafts.items() if absolute.is_relative_to(root)), None)


def draft_file(final: Path) -> Path:
    """A name for a file until it is finished, which no other process has: in containers all have the same number."""
    mark, own = secrets.token_hex(4), own_folder(final)
    if own is not None:
        return own / f"{final.name}.{mark}"
    final.parent.mkdir(parents=True, exist_ok=True)
    return final.with_name(f".{final.name}.{mark}.tmp")


def draft_directory(final: Path, end: str = "tmp") -> Path:
    """The same for a directory, one name for all processes that fill it."""
    own = own_folder(final)
    return own / f"{final.name}.{end}" if own is not None else final.with_name(f".{final.name}.{end}")


def discard(path: Path) -> None:
    """Remove a file or directory, if it is there: at once, and only if it is still this process's to remove."""
    own = own_folder(path)
    gone = own / f"{path.name}.{secrets.token_hex(4)}.gone" if own is not None else path
    if own is not None and path.exists():
        os.replace(path, gone)
    if gone.is_dir():
        shutil.rmtree(gone, ignore_errors=True)
    else:
        gone.unlink(missing_ok=True)


def write_atomic(path: Path, content: str | bytes) -> None:
    """Write a file so that a reader, or a crash at any moment, sees the old content or the new, never a part."""
    data = content.encode() if isinstance(content, str) else content
    with room_for(len(data)), replaced(path) as file:
        file.write(data)


@contextmanager
def replaced(path: Path) -> Iterator[IO[bytes]]:
    """The same of a file that is written bit by bit: it gets its name at the end, or nothing of it is left."""
    temporary = draft_file(path)
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        path.parent.mkdir(parents=True, exist_ok=True)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)  # what a full disk cut off must not fill it further
        raise
    fsync_directory(path.parent)


def begin_file(path: Path, content: str) -> TextIO:
    """A file that begins with this and is appended to by this process alone: another's of that name is another file."""
    temporary = draft_file(path)
    file = temporary.open("w", encoding="utf-8")
    file.write(content)
    file.flush()
    os.fsync(file.fileno())
    path.parent.mkdir(parents=True, exist_ok=True)
    os.replace(temporary, path)
    fsync_directory(path.parent)
    return file


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
    temporary = draft_directory(final)
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
    displaced = draft_directory(final, "old")
    if final.exists():
        shutil.rmtree(displaced, ignore_errors=True)
        os.replace(final, displaced)
    final.parent.mkdir(parents=True, exist_ok=True)
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

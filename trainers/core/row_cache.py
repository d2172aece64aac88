"""Where encoded rows lie in a workspace, under names that say all they are made of; and when they go.

A cache is found by its name and by nothing else: edited data, another template or a changed encoder have another name,
so there is nothing in a cache that could be out of date. Each node has caches of its own, as a table that processes of
several machines map at once is not one table.
"""

import fcntl
import os
import shutil
import tempfile
import time
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import tokenizers
import transformers

from trainers.contract import canonical_json, sha256_text
from trainers.core.chat import ChatFormat
from trainers.core.context import PhaseContext
from trainers.core.templates import template_of
from trainers.files import tree_digest
from trainers.fingerprints import fingerprint
from trainers.spec import DataSource

FOLDER = ".rows"
"""Of the workspace."""

UNUSED_SECONDS = 7 * 24 * 3600.0
LEAST_FREE = 0.1
"""Share of the disk. With less, caches that no process uses go, the oldest first, however old they are."""


def cache_root(ctx: PhaseContext) -> Path:
    workspace = ctx.dir.root.absolute().parent.parent
    return workspace / FOLDER / f"node-{os.environ.get('GROUP_RANK', '0')}"


def cache_name(ctx: PhaseContext, source: DataSource, schema: str, encode: "partial[Any]") -> str:
    """Of what the rows of a source become: a digest of all that decides it."""
    made_of = {
        "data": fingerprint(source, ctx.base_dir),
        "rows": [schema, source.format, source.columns, source.hub and source.hub.document()],
        "program": ctx.origins.program,
        "encode": [encode.func.__module__, encode.func.__qualname__],
        "arguments": [_mark(value) for value in (*encode.args, *sorted(encode.keywords.items()))],
        "versions": [tokenizers.__version__, transformers.__version__],
    }
    return f"tokens-{sha256_text(canonical_json(made_of))[:32]}"


def _mark(value: Any) -> Any:
    if isinstance(value, ChatFormat):
        return _chat_mark(value)
    assert isinstance(value, bool | int | float | str | tuple), "what decides tokens must have a name"
    return value


def _chat_mark(chat: ChatFormat) -> list[Any]:
    tokenizer = chat.tokenizer
    marks = {key: str(value) for key, value in tokenizer.special_tokens_map.items()}
    return [_tokenizer_mark(tokenizer), template_of(tokenizer), marks, sorted(chat.stop_ids), chat.num_embedded]


def _tokenizer_mark(tokenizer: Any) -> str:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        return sha256_text(backend.to_str())
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        return tree_digest(Path(folder))


def opened(folder: Path) -> Path:
    """A cache's folder, which is not removed as long as this process lives."""
    folder.mkdir(parents=True, exist_ok=True)
    mark = _use_mark(folder).open("ab")
    fcntl.flock(mark, fcntl.LOCK_SH)
    _held.append(mark)
    folder.mkdir(exist_ok=True)  # it may have been removed just before
    os.utime(mark.name)
    return folder


_held: list[Any] = []
"""Open files: closing one would end its lock."""


def drop_unused(root: Path) -> None:
    """Remove caches that no process uses: old ones, and as long as the disk is nearly full the oldest."""
    found = [path for path in root.glob("*") if path.is_dir()]
    for folder in sorted(found, key=_last_used):
        usage = shutil.disk_usage(root)
        if time.time() - _last_used(folder) < UNUSED_SECONDS and usage.free > LEAST_FREE * usage.total:
            break
        _drop(folder)


def _drop(folder: Path) -> None:
    with _use_mark(folder).open("ab") as mark, suppress(BlockingIOError):
        fcntl.flock(mark, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(folder, ignore_errors=True)


def _use_mark(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.used")


def _last_used(folder: Path) -> float:
    mark = _use_mark(folder)
    return (mark if mark.exists() else folder).stat().st_mtime

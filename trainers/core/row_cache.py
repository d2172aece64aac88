"""Where encoded rows lie in a workspace, under names that say all they are made of.

A cache is found by its name and by nothing else: edited data, another template or a changed encoder have another name,
so there is nothing in a cache that could be out of date. Each node has caches of its own, as a table that processes of
several machines map at once is not one table.
"""

import os
import tempfile
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

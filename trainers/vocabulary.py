"""Whether two vocabularies mean the same by a token. Imports no torch."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Vocabulary:
    ids: Mapping[str, int]
    """Of all tokens."""
    added: frozenset[str] = frozenset()
    """Tokens beside those that text is made of: marks, padding, and places kept free for more of them."""
    padding: str | None = None


def other_tokens(theirs: Vocabulary, ours: Vocabulary) -> str | None:
    """Why text, or an id, means something else to ``ours`` than to ``theirs``; None if it does not.

    What one of them has added is no matter until it is used, and padding never is: an instruct model has tokens that
    its base model lacks, or that are places kept free there.
    """
    padding = {theirs.padding, ours.padding}
    moved = [t for t, i in theirs.ids.items() if ours.ids.get(t, i) != i and t not in padding]
    if moved:
        first = moved[0]
        return f"{_count(moved)} have other ids, for example {first!r} {ours.ids[first]} and not {theirs.ids[first]}"
    lost = [token for token in theirs.ids if token not in ours.ids and token not in theirs.added]
    if lost:
        return f"it lacks {_count(lost)}, for example {lost[0]!r}"
    more = [token for token in ours.ids if token not in theirs.ids and token not in ours.added]
    return f"it has {_count(more)} more, for example {more[0]!r}" if more else None


def stored_vocabulary(folder: Path) -> Vocabulary:
    """That of a ``tokenizer.json``, which is there."""
    document = json.loads((folder / "tokenizer.json").read_text())
    words = document.get("model", {}).get("vocab", {})
    if isinstance(words, list):  # Unigram: [piece, score] in the order of their ids.
        words = {str(piece[0]): i for i, piece in enumerate(words)}
    added = {token["content"]: token["id"] for token in document.get("added_tokens", [])}
    return Vocabulary({**words, **added}, frozenset(added), _padding(folder / "tokenizer_config.json"))


def _padding(path: Path) -> str | None:
    settings: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    token = settings.get("pad_token")
    return token.get("content") if isinstance(token, dict) else token


def _count(tokens: list[str]) -> str:
    return f"{len(tokens)} token{'s' if len(tokens) > 1 else ''}"

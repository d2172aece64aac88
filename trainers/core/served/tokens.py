"""Whether a server's model reads text as the tokens that a tokenizer of the phase makes of it. Imports no torch."""

import re
from collections.abc import Iterable
from collections.abc import Sequence as List
from typing import Any

from trainers.core.served.wire import Wire

ASKED_TOKENS = 256
"""Of a vocabulary, from its first to its last, so that ids which are moved anywhere show."""

TEXT_TOKENS = 32
"""To one text, which so fits any server's context."""

ROW_TOKENS = 200
"""Of a row of the run's data, for the same reason."""


WORD = re.compile(r"[^\W_]+")


def vocabulary_texts(tokenizer: Any) -> list[str]:
    """Texts of words from all over a vocabulary: to a tokenizer of words a fixed text may be nothing but unknown.

    Not of added tokens: an instruct model has some that its base model lacks. Nor of pieces that are no whole characters.
    """
    ids = sorted(set(tokenizer.get_vocab().values()) - set(tokenizer.get_added_vocab().values()))
    spread = ids[:: max(1, -(-len(ids) // ASKED_TOKENS))]
    words = [word for i in spread if (word := tokenizer.decode([i]).strip()).isalnum()]
    parts = (words[i : i + TEXT_TOKENS] for i in range(0, len(words), TEXT_TOKENS))
    return [" ".join(some) for some in parts]


def row_texts(tokenizer: Any, rows: Iterable[List[int]]) -> list[str]:
    """Words of the first tokens of rows: a mark may be one token to a model that knows it, and several to its base model."""
    return [" ".join(WORD.findall(tokenizer.decode(list(row[:ROW_TOKENS])))) for row in rows]


def other_tokens(wire: Wire, tokenizer: Any, texts: Iterable[str]) -> str | None:
    """What text is other tokens to the server than to the tokenizer. None if none of these is, or it does not tell."""
    for text in texts:
        theirs, ours = wire.tokens(text), list(tokenizer(text, add_special_tokens=False)["input_ids"])
        if theirs is None or theirs == ours:
            continue
        shorter = min(len(theirs), len(ours))
        at = next((i for i in range(shorter) if theirs[i] != ours[i]), shorter)
        return f"from token {at} on {text[:40]!r} is {theirs[at : at + 4]} and not {ours[at : at + 4]}"
    return None

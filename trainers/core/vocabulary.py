"""Which tokens models know, and whether two of them mean the same by one."""

from collections.abc import Iterable
from typing import Any

import numpy as np

from trainers.contract import BadInput


def num_known(model: Any, tokenizer: Any) -> int:
    """Ids below this may be tokens that the model embeds. Above are rows that only make a matrix's size a round one."""
    named = max(tokenizer.get_vocab().values(), default=-1) + 1
    return int(min(named, model.get_input_embeddings().weight.shape[0]))


def check_known(rows: Iterable[Any], known: int | None, tokenizer: Any, where: str, reader: str) -> None:
    """Raise BadInput if a row of token ids holds one that a model does not know. ``where``: the field of the rows."""
    largest = max((int(np.max(row)) for row in rows if len(row)), default=-1)
    if known is not None and largest >= known:
        token = tokenizer.convert_ids_to_tokens(largest)
        raise BadInput(
            f"{where}: the {reader} does not know the token {token!r}: use rows without it, or another {reader}"
        )


def other_ids(first: Any, second: Any) -> str | None:
    """Which of the first tokenizer's tokens are others in the second one, or None if the second reads what it writes."""
    ours, theirs = first.get_vocab(), second.get_vocab()
    wrong = [token for token, index in ours.items() if theirs.get(token) != index]
    return f"{len(wrong)} of {len(ours)} have another id or none, for example {wrong[0]!r}" if wrong else None


def same_tokens(teacher: Any, student: Any) -> str | None:
    """Why the student's tokenizer cannot serve the teacher's, or None. Ids must mean the same text in both."""
    ours, theirs = student.get_vocab(), teacher.get_vocab()
    wrong = [token for token, index in theirs.items() if ours.get(token) != index]
    if wrong:
        return f"{len(wrong)} of the teacher's {len(theirs)} tokens have another id or none, for example {wrong[0]!r}"
    if teacher.eos_token_id != student.eos_token_id:
        return f"the end token is {student.eos_token!r}, the teacher's is {teacher.eos_token!r}"
    if teacher.chat_template != student.chat_template:
        return "the chat templates differ"
    return None

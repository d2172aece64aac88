"""Which tokens models know, whether two of them mean the same by one, and are spoken to in the same way."""

from collections.abc import Iterable
from typing import Any

import numpy as np

from trainers.contract import BadInput
from trainers.core.chat import ChatFormat, chat_format
from trainers.core.templates import Messages
from trainers.vocabulary import Vocabulary, other_tokens

PROBES: tuple[Messages, ...] = (
    [{"role": "user", "content": "Is it 5?"}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Is it 5?"}],
    [
        {"role": "user", "content": "Is it 5?"},
        {"role": "assistant", "content": "Yes."},
        {"role": "user", "content": "Is it 6?"},
    ],
)
"""Conversations that two formats make the same tokens of if they are one."""


def num_known(model: Any, tokenizer: Any) -> int:
    """Ids below this may be tokens that the model embeds. Above are rows that only make a matrix's size a round one."""
    named = max(tokenizer.get_vocab().values(), default=-1) + 1
    return int(min(named, model.get_input_embeddings().weight.shape[0]))


def lowest(*known: int | None) -> int | None:
    """The ids that all of some models know; None sets no limit."""
    return min((number for number in known if number is not None), default=None)


def check_known(rows: Iterable[Any], known: int | None, tokenizer: Any, where: str, reader: str) -> None:
    """Raise BadInput if a row of token ids holds one that a model does not know. ``where``: the field of the rows."""
    largest = max((int(np.max(row)) for row in rows if len(row)), default=-1)
    if known is not None and largest >= known:
        token = tokenizer.convert_ids_to_tokens(largest)
        raise BadInput(
            f"{where}: the {reader} does not know the token {token!r}: use rows without it, or another {reader}"
        )


def same_tokens(teacher: Any, student: Any) -> str | None:
    """Why the student's tokenizer cannot serve the teacher's, or None: what to change is part of it.

    Ids of text must mean the same in both, and conversations become the same tokens. Other differences are no matter:
    padding, tokens that nothing uses, the name of the end token where the template ends turns by itself.
    """
    difference = other_tokens(vocabulary_of(teacher), vocabulary_of(student))
    if difference is not None:
        return f"{difference}; use models of one family"
    ours, theirs = chat_format(student), chat_format(teacher)
    return next((reason for probe in PROBES if (reason := _differently(theirs, ours, probe))), None)


def same_ids(speaker: Any, reader: Any) -> str | None:
    """Why a model that only scores, with the tokenizer ``reader``, cannot read the tokens of ``speaker``; or None.

    It is never asked anything, so its own template is no matter: the marks of the other's are tokens like all others.
    """
    difference = other_tokens(vocabulary_of(speaker), vocabulary_of(reader))
    if difference is not None:
        return f"{difference}; use models of one family"
    chat = chat_format(speaker)
    found = [tokens for probe in PROBES if (tokens := _tokens(chat, probe)) is not None]
    for index in sorted({index for prompt, answer in found for index in (*prompt, *answer)}):
        wanted, got = (tokenizer.convert_ids_to_tokens(index) for tokenizer in (speaker, reader))
        if wanted != got:
            return f"{wanted!r}, which conversations have, is {got!r} to it; use a model that knows it"
    return None


def vocabulary_of(tokenizer: Any) -> Vocabulary:
    return Vocabulary(tokenizer.get_vocab(), frozenset(tokenizer.get_added_vocab()), tokenizer.pad_token)


def _differently(teacher: ChatFormat, student: ChatFormat, messages: Messages) -> str | None:
    theirs, ours = _tokens(teacher, messages), _tokens(student, messages)
    if ours == theirs:
        return None
    if ours and theirs and (ours[0], ours[1][:-1]) == (theirs[0], theirs[1][:-1]):
        wanted = teacher.tokenizer.convert_ids_to_tokens(theirs[1][-1])
        got = student.tokenizer.convert_ids_to_tokens(ours[1][-1])
        return f"the end token is {got!r}, the other model's is {wanted!r}: set endToken to {wanted!r}"
    return "the chat templates differ: set chatTemplate to the text, or the file, of the other model's"


def _tokens(chat: ChatFormat, messages: Messages) -> tuple[list[int], list[int]] | None:
    """None for a conversation that the template refuses."""
    try:
        return chat.answer(messages, "Yes.")
    except BadInput:
        return None

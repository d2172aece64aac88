"""From rows to token sequences. One encode path for training, scoring and generation."""

from dataclasses import dataclass

import numpy as np

from trainers.core.batch import Sequence
from trainers.core.chat import ChatFormat
from trainers.core.rows import Row


def prompt_messages(row: Row) -> list[dict[str, str]]:
    return row.get("messages") or [{"role": "user", "content": row["prompt"]}]


def prompt_ids(chat: ChatFormat, row: Row) -> list[int]:
    """Token ids up to where the assistant starts to speak."""
    return chat.prompt(prompt_messages(row))


def response_sequence(chat: ChatFormat, prompt: list[int], response: str, max_length: int) -> Sequence | None:
    """Prompt and response, only the response (with its end token) scored; None if the response alone is too long.

    A long prompt loses its left end: cutting the right end would remove what is being asked, and cutting the response
    would teach the model to stop in the middle.
    """
    return joined(prompt, chat.response(response), max_length)


def joined(prompt: list[int], response: list[int], max_length: int) -> Sequence | None:
    """See :func:`response_sequence`; for a response that is already tokens."""
    room = max_length - len(response)
    if room < 1:
        return None
    kept = prompt[-room:]
    ids = np.array(kept + response, dtype=np.int64)
    scored = np.zeros(len(ids), dtype=bool)
    scored[len(kept) :] = True
    return Sequence(ids, scored, shortened=len(prompt) - len(kept))


def sft_sequences(chat: ChatFormat, row: Row, max_length: int, everything: bool) -> list[Sequence]:
    """The training sequences of an sft row; none if nothing of it can be learned within the limit."""
    if "messages" not in row:
        sequence = response_sequence(chat, prompt_ids(chat, row), row["response"], max_length)
    else:
        sequence = _conversation(chat, row["messages"], max_length)
    if sequence is not None and everything:
        sequence = Sequence(sequence.ids, np.ones(len(sequence), dtype=bool))
    return [] if sequence is None else [sequence]


def _conversation(chat: ChatFormat, messages: list[dict[str, str]], max_length: int) -> Sequence | None:
    """All turns, the assistant's scored. Too long a conversation loses its oldest tokens."""
    ids, scored = chat.conversation(messages)
    ids, scored = ids[-max_length:], scored[-max_length:]
    sequence = Sequence(np.array(ids, dtype=np.int64), np.array(scored, dtype=bool))
    return sequence if sequence.num_scored else None


@dataclass(frozen=True)
class Pair:
    chosen: Sequence
    rejected: Sequence
    margin: float = 0.0

    @property
    def sequences(self) -> list[Sequence]:
        return [self.chosen, self.rejected]

    @property
    def shortened(self) -> int:
        return max(self.chosen.shortened, self.rejected.shortened)


def preference_pairs(chat: ChatFormat, row: Row, max_length: int) -> list[Pair]:
    """Both sequences of a preference row as one pair; none if a response is too long."""
    prompt = prompt_ids(chat, row)
    chosen = response_sequence(chat, prompt, row["chosen"], max_length)
    rejected = response_sequence(chat, prompt, row["rejected"], max_length)
    return [] if chosen is None or rejected is None else [Pair(chosen, rejected)]

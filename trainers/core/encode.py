"""From rows to token sequences. One encode path for training, scoring and generation."""

from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np

from trainers.contract import BadInput
from trainers.core.batch import Sequence
from trainers.core.chat import ChatFormat
from trainers.core.rows import Row
from trainers.core.templates import Messages

Turn = tuple[list[int], list[int]]
"""Tokens of a prompt and of the answer to it."""


def prompt_messages(row: Row) -> Messages:
    """The turns of a row, behind the tools that they may use (:mod:`trainers.core.tools`)."""
    turns: Messages = row.get("messages") or [{"role": "user", "content": row["prompt"]}]
    return [{"role": "tools", "tools": row["tools"]}, *turns] if row.get("tools") else turns


def prompt_ids(chat: ChatFormat, row: Row) -> list[int]:
    """Token ids up to where the assistant starts to speak."""
    return chat.prompt(prompt_messages(row))


def joined(prompt: list[int], response: list[int], max_length: int) -> Sequence | None:
    """Prompt and response, only the response (with its end token) scored; None if the response alone is too long.

    A long prompt loses its left end: cutting the right end would remove what is being asked, and cutting the response
    would teach the model to stop in the middle.
    """
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
    if "messages" in row:
        found = conversation(chat.turns(prompt_messages(row)), max_length)
    else:
        found = conversation([chat.taught(prompt_messages(row), row["response"])], max_length)
    if not everything:
        return found
    if any(turn.get("weight") == 0 for turn in row.get("messages", [])):
        raise BadInput("a turn of weight 0 is not to be learned, and lossOn: everything learns all")
    return _all_scored(found)


def _all_scored(sequences: list[Sequence]) -> list[Sequence]:
    """A row's sequences with everything learned, but what two of them begin with only once."""
    starts = [0] + [_shared(a.ids, b.ids) for a, b in pairwise(sequences)]
    return [replace(s, scored=np.arange(len(s)) >= start) for s, start in zip(sequences, starts, strict=False)]


def _shared(first: np.ndarray, second: np.ndarray) -> int:
    """Tokens that both begin with."""
    length = min(len(first), len(second))
    same = first[:length] == second[:length]
    return length if same.all() else int(same.argmin())


def conversation(turns: list[Turn], max_length: int) -> list[Sequence]:
    """A conversation's answers, each learned once, after the tokens that prompt for it and by the rules of ``joined``.

    As long as a prompt goes on where the last answer ended, they are one sequence. A template that shows earlier turns
    otherwise than it asked for them (Qwen3 takes out their thoughts) makes a sequence of every answer, as does a limit.
    """
    found: list[Sequence] = []
    left_out = 0
    for prompt, response in turns:
        longer = _continued(found[-1], prompt, response, max_length) if found else None
        sequence = longer or joined(prompt, response, max_length)
        if sequence is None:
            left_out += len(response)
        elif longer is not None:
            found[-1] = sequence
        else:
            found.append(sequence)
    if found and left_out:
        found[-1] = replace(found[-1], shortened=found[-1].shortened + left_out)
    return found


def _continued(sequence: Sequence, prompt: list[int], response: list[int], max_length: int) -> Sequence | None:
    """A sequence with the answer that follows it, or None if it does not."""
    start = len(sequence)
    if len(prompt) + len(response) > max_length or prompt[:start] != sequence.ids.tolist():
        return None
    between = np.zeros(len(prompt) - start, dtype=bool)
    ids = np.array(prompt + response, dtype=np.int64)
    return Sequence(ids, np.concatenate([sequence.scored, between, np.ones(len(response), dtype=bool)]))


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
    """Both sequences of a preference row as one pair, behind one prompt; none if a response is too long.

    The prompt is cut for the longer response: the loss compares answers to the same question. Raises BadInput for two
    answers that are one to the model.
    """
    answers = [chat.taught(prompt_messages(row), row[side]) for side in ("chosen", "rejected")]
    if answers[0] == answers[1]:
        raise BadInput("chosen and rejected are the same tokens: the template shows nothing of what they differ in")
    room = max_length - max(len(response) for _, response in answers)
    chosen, rejected = (joined(prompt, response, room + len(response)) for prompt, response in answers)
    return [] if chosen is None or rejected is None else [Pair(chosen, rejected)]

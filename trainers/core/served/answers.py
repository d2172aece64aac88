"""What a server has answered, read into values of which everything is known: types, ranges, lengths, sums.

JSON that is well formed may hold anything, so no part of it is used that has not gone through here. What is wrong is the
server's fault, told in one line that names it, the place in its answer, and what stands there. Imports no torch.

Names: T positions of a sequence, k likeliest next tokens.
"""

import reprlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from trainers.contract import BadInput

MOST_TOKENS = 2**24
"""No vocabulary has more, and kept ids have three bytes."""

ROUNDING = 0.01
"""How far log-probabilities may be above 0, and probabilities together above 1: some servers work them out in bf16."""

LOWEST = -3.5e38
"""What fp32 holds is above it. vLLM says -9999 for a probability of 0."""


@dataclass(frozen=True)
class Part:
    """Something that a server has said, and where it stands in its answer."""

    who: str
    """The field that names the server, and its address."""
    place: str
    """Empty for the whole."""
    value: Any

    def wrong(self, wanted: str) -> BadInput:
        """What to raise for a value that is not what is ``wanted``."""
        where = f"{self.place} " if self.place else ""
        return BadInput(f"{self.who} answers with {where}{shown(self.value)}, where {wanted} belongs")

    def member(self, name: str) -> "Part":
        found = self.optional(name)
        if found.value is None:
            raise BadInput(f"{self.who} answers without {found.place}: it must be vLLM 0.10.2 or newer")
        return found

    def optional(self, name: str) -> "Part":
        """Holds None where there is none."""
        if not isinstance(self.value, dict):
            raise self.wrong("an object")
        return Part(self.who, f"{self.place}.{name}" if self.place else name, self.value.get(name))

    def items(self) -> "list[Part]":
        if not isinstance(self.value, list):
            raise self.wrong("a list")
        return [Part(self.who, f"{self.place}[{i}]", value) for i, value in enumerate(self.value)]

    def text(self) -> str:
        if not isinstance(self.value, str):
            raise self.wrong("text")
        return self.value

    def count(self) -> int:
        if type(self.value) is not int or self.value < 1:
            raise self.wrong("a number above 0")
        return self.value

    def tokens(self, below: int = MOST_TOKENS) -> list[int]:
        """Ids of a vocabulary of so many."""
        return list(self._all(lambda value: type(value) is int and 0 <= value < below, f"a token's id below {below}"))

    def logprobs(self) -> list[float]:
        return list(map(float, self._all(_is_logprob, "a token's log-probability")))

    def _all(self, fits: Callable[[Any], bool], wanted: str) -> list[Any]:
        values: list[Any] = self.value if isinstance(self.value, list) else []
        for item, value in zip(self.items(), values, strict=True):
            if not fits(value):
                raise item.wrong(wanted)
        return values


@dataclass(frozen=True)
class Scored:
    """Tokens of each position by rank: the k likeliest, and the one that stands there where it is none of them."""

    ids: np.ndarray
    """(T, k + 1); -1 in places that no token is left for, which are the last ones."""
    logprobs: np.ndarray
    """(T, k + 1); -inf in such places."""


def scored(part: Part, length: int, first: int, k: int, least: int) -> Scored:
    """A sequence's ``prompt_logprobs`` from position ``first`` on, each of k tokens, or ``least`` if there are no more."""
    positions = part.items()
    if len(positions) != length:
        raise part.wrong(f"a list of {length}")
    wanted = f"at least {least} tokens with their logprob and rank"
    table = np.full((length - first, 3, k + 1), np.array([[-1], [-np.inf], [np.inf]]))
    for row, position in zip(table, positions[first:], strict=True):
        found = _position(position.value)
        if found is None or not least <= found.shape[1] <= k + 1:
            raise position.wrong(wanted)
        row[:, : found.shape[1]] = found
    order = np.argsort(table[:, 2], axis=1, kind="stable")
    ids, logprobs, ranks = (np.take_along_axis(table[:, i], order, axis=1) for i in range(3))
    for number in np.flatnonzero(~_fit(ids, logprobs, ranks))[:1]:
        raise positions[first + number].wrong(
            f"{wanted}, probabilities that fall with the rank, sum up to no more than 1 and leave the likeliest its share"
        )
    return Scored(ids.astype(np.int64), logprobs)


def _position(value: Any) -> np.ndarray | None:
    """Ids, log-probabilities and ranks, (3, tokens); None of what has none."""
    try:
        entries, ids = list(value.values()), list(map(int, value))
        logprobs, ranks = [entry["logprob"] for entry in entries], [entry["rank"] for entry in entries]
        if {*map(type, logprobs)} <= {float, int} and {*map(type, ranks)} <= {int} and [*map(str, ids)] == [*value]:
            return np.array([ids, logprobs, ranks], dtype=np.float64)
    except (AttributeError, TypeError, KeyError, ValueError, OverflowError):
        pass
    return None


def _fit(ids: np.ndarray, logprobs: np.ndarray, ranks: np.ndarray) -> np.ndarray:
    """Which positions hold what they should, (T,)."""
    low, high = (ids >= 0) & (logprobs >= LOWEST) & (ranks >= 1), (ids < MOST_TOKENS) & (logprobs <= ROUNDING)
    likely = logprobs[:, 0] >= -np.log(MOST_TOKENS)  # of the likeliest of so many
    falling = logprobs[:, 1:] <= logprobs[:, :-1] + ROUNDING
    together = np.exp(np.minimum(logprobs, ROUNDING)).sum(axis=1)
    return ((low & high) | np.isinf(ranks)).all(axis=1) & falling.all(axis=1) & likely & (together <= 1 + ROUNDING)


def _is_logprob(value: Any) -> bool:
    return type(value) in (float, int) and LOWEST <= value <= ROUNDING


def shown(value: Any) -> str:
    """A value on part of a line, whatever it holds."""
    text = reprlib.repr(value)
    return text if len(text) <= 100 else f"{text[:97]}..."


def plain(text: str, most: int = 300) -> str:
    """Somebody's words on part of a line: what cannot be printed is written as Python does."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text[:most])

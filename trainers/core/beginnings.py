"""What prompts begin with alike, so that it is read once: a system prompt, a template, a conversation that goes on.

Prompts in order are a tree: those that begin alike stand together, and what the first and the last of some share, all of
them do. A beginning is read into the slot of the first one and copied to the others', which then read what is behind it, at
the next level, where they may share a beginning again.
"""

from bisect import bisect
from collections.abc import Iterator, Mapping
from collections.abc import Sequence as List
from dataclasses import dataclass
from itertools import groupby

Prompt = tuple[int, ...]

WORTH = 256
"""Tokens that a beginning saves, or it is read with each of its prompts: it takes a pass of its own, as long as so many."""
FEWEST = 16
"""Tokens of a prompt that are worth a copy from another slot, where they are not all of it."""
MOST = 2**22
"""Pairs of a token and what it may look at behind a beginning, which takes a mask of all of them."""


@dataclass(frozen=True)
class Piece:
    """A prompt up to some token, of which what is behind ``start`` is to be read; ``others`` begin with all of it, too."""

    tokens: Prompt
    start: int
    of: Prompt
    others: List[Prompt] = ()


def longest_beginning(prompt: Prompt, others: List[Prompt]) -> tuple[int, Prompt]:
    """Of others in order: which one a prompt shares most of its first tokens with, and how many these are."""
    at = bisect(others, prompt)
    return max(((_common(prompt, other), other) for other in others[max(at - 1, 0) : at + 1]), default=(0, ()))


def levels(prompts: Mapping[Prompt, int]) -> Iterator[list[Piece]]:
    """What to read, one level after the other. ``prompts``: of how many first tokens keys and values are there already."""
    now = [(sorted(prompts), 0)] if prompts else []
    while now:
        pieces: list[Piece] = []
        later: list[tuple[list[Prompt], int]] = []
        while now:
            group, start = now.pop()
            if len(group) == 1:
                pieces += _rest(group[0], max(start, prompts[group[0]]))
                continue
            end = _common(group[0], group[-1])
            start = max(start, min(end, *(prompts[prompt] for prompt in group)))
            lacking = [prompt for prompt in group if prompts[prompt] < end]
            parts = [list(some) for _, some in groupby(group, key=lambda prompt: prompt[end : end + 1])]
            if (len(lacking) - 1) * (end - start) >= WORTH:
                pieces.append(_piece(group[0][:end], start, lacking[0], lacking[1:]))
                later += [(part, end) for part in parts]
            else:
                now += [(part, start) for part in parts]
        if pieces:
            yield pieces
        now = later


def _rest(prompt: Prompt, start: int) -> list[Piece]:
    return [_piece(prompt, start, prompt)] if start < len(prompt) else []


def _piece(tokens: Prompt, start: int, of: Prompt, others: List[Prompt] = ()) -> Piece:
    """From the first token on where the mask would be too large: that is read without one."""
    fits = (len(tokens) - start) * len(tokens) <= MOST
    return Piece(tokens, start if fits else 0, of, others)


def _common(one: Prompt, other: Prompt) -> int:
    """First tokens that are the same."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))

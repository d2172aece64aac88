"""From token sequences to tensors: packing, micro-batches, and which positions are scored.

Names: S sequences, R rows, L positions in a row, K scored positions in the whole batch.

No attention mask is ever passed. Padded rows are padded on the right, where a causal model cannot see the padding;
packed rows restart ``position_ids`` at every sequence, which transformers turns into a block mask (exact under SDPA
when the cache is off, see tests/trainers/test_batch.py).
"""

from bisect import bisect_left, insort
from collections.abc import Callable
from collections.abc import Sequence as List
from dataclasses import dataclass
from enum import IntEnum
from heapq import heappop, heapreplace

import numpy as np
import torch


class Packing(IntEnum):
    """How a pass's sequences lie in rows, from what every model can to what wastes least."""

    PADDED = 0
    """Each in a row of its own."""
    ROWS = 1
    """Rows as long as the longest, for attention by a mask: its pairs of positions are those within a row."""
    ONE_ROW = 2
    """All behind each other, without padding, for attention that sees no pairs of different sequences."""


@dataclass(frozen=True)
class Sequence:
    """Token ids and, for each, whether it is scored (predicted from the tokens before it)."""

    ids: np.ndarray
    scored: np.ndarray
    shortened: int = 0
    """Tokens of the row that were left out to keep to a length limit."""

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def num_scored(self) -> int:
        """Scored tokens; the first token has nothing before it and never counts."""
        return int(self.scored[1:].sum())


@dataclass(frozen=True)
class Batch:
    """One forward pass."""

    input_ids: torch.Tensor
    """(R, L)"""
    position_ids: torch.Tensor | None
    """(R, L) when rows hold several sequences, else None."""
    scored_at: torch.Tensor
    """(K,) flat position whose *next* token is scored, sequence by sequence."""
    target_ids: torch.Tensor
    """(K,) that next token."""
    segment: torch.Tensor
    """(K,) index of the sequence, 0..S-1."""
    last_at: torch.Tensor
    """(S,) flat position of each sequence's last token."""
    num_tokens: int
    """Real tokens, padding not counted."""
    bounds: torch.Tensor | None = None
    """Flat positions at which packed sequences begin, and the end: (S' + 1,) in int32; a row's padding is one of them."""
    longest: int = 0
    """Tokens of the longest packed sequence."""

    @property
    def num_sequences(self) -> int:
        return len(self.last_at)

    def sums(self, values: torch.Tensor) -> torch.Tensor:
        """Add (K,) values up by sequence: (S,)."""
        return values.new_zeros(self.num_sequences).index_add(0, self.segment, values)

    def counts(self) -> torch.Tensor:
        """Scored tokens of each sequence: (S,)."""
        return torch.bincount(self.segment, minlength=self.num_sequences)


def pack_rows(lengths: List[int], capacity: int) -> list[list[int]]:
    """Best-fit decreasing: indices of sequences, row by row, no row longer than ``capacity`` unless one sequence is.

    >>> pack_rows([3, 4, 1], 4)
    [[1], [0, 2]]
    """
    rows: list[list[int]] = []
    rooms: list[tuple[int, int]] = []  # (what is free, row), sorted
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        at = bisect_left(rooms, (lengths[index], -1))
        if at == len(rooms):
            room, row = capacity, len(rows)
            rows.append([])
        else:
            room, row = rooms.pop(at)
        rows[row].append(index)
        insort(rooms, (room - lengths[index], row))
    return rows


def plan_micro_batches(
    lengths: List[List[int]],
    max_tokens: int,
    packing: bool | Packing,
    world: int = 1,
    costs: List[float] | None = None,
) -> list[list[list[int]]]:
    """Split items over ranks and forward passes, so that ranks wait for each other as little as items allow.

    ``lengths[i]`` are the lengths of item i's sequences (a pair has two), which stay together; ``costs[i]`` is its
    work, by default its tokens. Returns, for each rank, its forward passes as lists of item indices. All ranks get the
    same number, because collectives must match, and passes of like cost at the same place, because they may wait for
    each other there; with fewer items than passes some are empty. Every rank computes the same plan, so nothing is
    exchanged. An item above ``max_tokens`` has a pass of its own.
    """
    costs = [float(sum(some)) for some in lengths] if costs is None else costs
    groups = _packed(lengths, costs, max_tokens, world) if packing else _padded(lengths, max_tokens, world)
    groups.sort(key=lambda group: -sum(costs[i] for i in group))
    rounds = [groups[first : first + world] for first in range(0, len(groups), world)]
    # Every other round is dealt backwards, so that no rank always has the largest.
    dealt = [some if number % 2 == 0 else some[::-1] for number, some in enumerate(rounds)]
    return [[some[rank] for some in dealt] for rank in range(world)]


def _packed(lengths: List[List[int]], costs: List[float], max_tokens: int, world: int) -> list[list[int]]:
    """Groups of like cost, a multiple of ``world``: as few as the tokens could be packed into, where that is found."""
    sizes = [sum(some) for some in lengths]
    large = sum(size > max_tokens for size in sizes)
    least = large + -(-sum(size for size in sizes if size <= max_tokens) // max_tokens)
    tight = pack_rows(sizes, max_tokens)
    for wanted in range(_multiple(least, world), len(tight), world):
        groups = _spread(sizes, costs, max_tokens, wanted)
        if groups is not None:
            return groups
    wanted = _multiple(len(tight), world)
    return _spread(sizes, costs, max_tokens, wanted) or _split(tight, wanted)


def _spread(sizes: List[int], costs: List[float], max_tokens: int, count: int) -> list[list[int]] | None:
    """The costliest item first, each to the group with the least to do (Graham 1969); None if one has no room there."""
    groups: list[list[int]] = [[] for _ in range(count)]
    least = [(0.0, 0, group) for group in range(count)]  # a heap of (cost, tokens, group)
    for index in sorted(range(len(sizes)), key=lambda i: -costs[i]):
        cost, tokens, group = least[0] if least else (0.0, max_tokens, -1)
        if tokens and tokens + sizes[index] > max_tokens:
            return None
        groups[group].append(index)
        if sizes[index] > max_tokens:
            heappop(least)
        else:
            heapreplace(least, (cost + costs[index], tokens + sizes[index], group))
    return groups


def _padded(lengths: List[List[int]], max_tokens: int, world: int) -> list[list[int]]:
    """Groups of items of like length, a multiple of ``world``, evened out by the smallest limit that gives no more."""
    order = sorted(range(len(lengths)), key=lambda i: -max(lengths[i]))
    wanted = _multiple(len(_fill(order, lengths, max_tokens)), world)
    if len(order) > wanted:
        max_tokens = _smallest(max_tokens, lambda limit: len(_fill(order, lengths, limit)) <= wanted)
    return _split(_fill(order, lengths, max_tokens), wanted)


def _fill(order: List[int], lengths: List[List[int]], max_tokens: int) -> list[list[int]]:
    """One group after the other, the longest items first, each as full as the limit allows; one above it is alone."""
    groups: list[list[int]] = []
    longest = rows = 0
    for index in order:
        if not groups or (rows + len(lengths[index])) * longest > max_tokens:
            groups.append([])
            longest, rows = max(lengths[index]), 0
        groups[-1].append(index)
        rows += len(lengths[index])
    return groups


def _smallest(high: int, enough: Callable[[int], bool]) -> int:
    """The smallest number from 1 to ``high`` that is enough, where ``high`` is and larger ones stay so."""
    low = 1
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle + 1, high)
    return high


def _multiple(count: int, of: int) -> int:
    """The next multiple that is not smaller."""
    return -(-count // of) * of


def _split(groups: list[list[int]], wanted: int) -> list[list[int]]:
    """Halve the groups with the most items until there are as many as wanted; where items are too few, some are empty."""
    groups = list(groups)
    while len(groups) < wanted:
        largest = max(range(len(groups)), key=lambda g: len(groups[g]))
        group = groups[largest]
        groups[largest : largest + 1] = [group[::2], group[1::2]]
    return groups


def collate(sequences: List[Sequence], packing: bool | Packing, device: torch.device, pad_id: int = 0) -> Batch:
    """Lay sequences out in rows. The batch's sequences keep the order given, whatever row they are in.

    An empty list gives one unscored token, so that a rank without work still takes part in a step.
    """
    sequences = sequences or [Sequence(np.array([pad_id]), np.array([False]))]
    lengths = [len(s) for s in sequences]
    width = sum(lengths) if packing == Packing.ONE_ROW else max(lengths)
    rows = pack_rows(lengths, width) if packing else [[i] for i in range(len(sequences))]
    place = _places(rows, lengths, width)
    input_ids = np.full(len(rows) * width, pad_id, dtype=np.int64)
    for sequence, start in zip(sequences, place, strict=True):
        input_ids[start : start + len(sequence)] = sequence.ids
    scored = [np.flatnonzero(s.scored[1:]) for s in sequences]
    positions = _positions(rows, lengths, width) if len(rows) < len(sequences) else None
    bounds = None if positions is None else np.append(np.flatnonzero(positions.ravel() == 0), positions.size)

    def tensor(parts: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(parts.astype(np.int64)).to(device)

    return Batch(
        input_ids=tensor(input_ids).view(len(rows), width),
        position_ids=None if positions is None else tensor(positions),
        scored_at=tensor(np.concatenate([start + at for start, at in zip(place, scored, strict=True)])),
        target_ids=tensor(np.concatenate([s.ids[at + 1] for s, at in zip(sequences, scored, strict=True)])),
        segment=tensor(np.repeat(np.arange(len(sequences)), [len(at) for at in scored])),
        last_at=tensor(np.array([start + n - 1 for start, n in zip(place, lengths, strict=True)])),
        num_tokens=sum(lengths),
        bounds=None if bounds is None else tensor(bounds).int(),
        longest=0 if bounds is None else int(np.diff(bounds).max()),
    )


def _places(rows: list[list[int]], lengths: list[int], width: int) -> list[int]:
    """Flat position of each sequence's first token."""
    place = [0] * len(lengths)
    for r, row in enumerate(rows):
        offset = r * width
        for index in row:
            place[index] = offset
            offset += lengths[index]
    return place


def _positions(rows: list[list[int]], lengths: list[int], width: int) -> np.ndarray:
    """(R, L) positions that restart at every sequence; the padding at a row's end is a sequence of its own."""
    positions = np.zeros((len(rows), width), dtype=np.int64)
    for r, row in enumerate(rows):
        parts = [np.arange(lengths[i]) for i in row]
        filled = sum(lengths[i] for i in row)
        positions[r] = np.concatenate([*parts, np.arange(width - filled)])
    return positions

"""From token sequences to tensors: packing, micro-batches, and which positions are scored.

Names: S sequences, R rows, L positions in a row, K scored positions in the whole batch.

No attention mask is ever passed. Padded rows are padded on the right, where a causal model cannot see the padding;
packed rows restart ``position_ids`` at every sequence, which transformers turns into a block mask (exact under SDPA
when the cache is off, see tests/trainers/test_batch.py).
"""

from collections.abc import Sequence as List
from dataclasses import dataclass

import numpy as np
import torch


@dataclass(frozen=True)
class Sequence:
    """Token ids and, for each, whether it is scored (predicted from the tokens before it)."""

    ids: np.ndarray
    scored: np.ndarray

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
    """Best-fit decreasing: indices of sequences, row by row, no row longer than ``capacity``.

    >>> pack_rows([3, 4, 1], 4)
    [[1], [0, 2]]
    """
    rows: list[list[int]] = []
    room: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        fits = [r for r in range(len(rows)) if room[r] >= lengths[index]]
        row = min(fits, key=lambda r: room[r], default=None)
        if row is None:
            row = len(rows)
            rows.append([])
            room.append(capacity)
        rows[row].append(index)
        room[row] -= lengths[index]
    return rows


def plan_micro_batches(
    lengths: List[List[int]], max_tokens: int, packing: bool, world: int = 1
) -> list[list[list[int]]]:
    """Split one optimizer step over ranks and forward passes.

    ``lengths[i]`` are the lengths of item i's sequences (a pair has two), which stay together. Returns, for each rank,
    its micro-batches as lists of item indices. All ranks get the same number, because collectives must match; the
    shortfall is empty micro-batches. Every rank computes the same plan, so nothing is exchanged.
    """
    groups: list[list[int]] = [[]]
    tokens = rows = 0
    for index in sorted(range(len(lengths)), key=lambda i: -max(lengths[i])):
        item_rows = len(lengths[index])
        longest = max(lengths[groups[-1][0]]) if groups[-1] else max(lengths[index])
        cost = tokens + sum(lengths[index]) if packing else (rows + item_rows) * longest
        if groups[-1] and cost > max_tokens:
            groups.append([])
            tokens = rows = 0
        groups[-1].append(index)
        tokens += sum(lengths[index])
        rows += item_rows
    groups = _split_for_ranks([g for g in groups if g], world)
    return [groups[rank::world] for rank in range(world)]


def _split_for_ranks(groups: list[list[int]], world: int) -> list[list[int]]:
    """Halve the largest groups until every rank has one, then fill up with empty ones to a multiple of ``world``."""
    while len(groups) < world and max(map(len, groups), default=0) > 1:
        largest = max(range(len(groups)), key=lambda g: len(groups[g]))
        group = groups[largest]
        groups[largest : largest + 1] = [group[::2], group[1::2]]
    return groups + [[] for _ in range(-len(groups) % world)]


def collate(sequences: List[Sequence], packing: bool, device: torch.device, pad_id: int = 0) -> Batch:
    """Lay sequences out in rows. The batch's sequences keep the order given, whatever row they are in.

    An empty list gives one unscored token, so that a rank without work still takes part in a step.
    """
    sequences = sequences or [Sequence(np.array([pad_id]), np.array([False]))]
    lengths = [len(s) for s in sequences]
    width = max(lengths)
    rows = pack_rows(lengths, width) if packing else [[i] for i in range(len(sequences))]
    place = _places(rows, lengths, width)
    input_ids = np.full(len(rows) * width, pad_id, dtype=np.int64)
    for sequence, start in zip(sequences, place, strict=True):
        input_ids[start : start + len(sequence)] = sequence.ids
    scored = [np.flatnonzero(s.scored[1:]) for s in sequences]
    packed = len(rows) < len(sequences)

    def tensor(parts: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(parts.astype(np.int64)).to(device)

    return Batch(
        input_ids=tensor(input_ids).view(len(rows), width),
        position_ids=tensor(_positions(rows, lengths, width)) if packed else None,
        scored_at=tensor(np.concatenate([start + at for start, at in zip(place, scored, strict=True)])),
        target_ids=tensor(np.concatenate([s.ids[at + 1] for s, at in zip(sequences, scored, strict=True)])),
        segment=tensor(np.repeat(np.arange(len(sequences)), [len(at) for at in scored])),
        last_at=tensor(np.array([start + n - 1 for start, n in zip(place, lengths, strict=True)])),
        num_tokens=sum(lengths),
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


@dataclass(frozen=True)
class BatchOrder:
    """Which examples each optimizer step sees: a pure function of (seed, step), so resuming needs no state."""

    num_examples: int
    batch_size: int
    epochs: float
    max_steps: int | None
    seed: int

    @property
    def total_examples(self) -> int:
        if self.max_steps is not None:
            return self.max_steps * self.batch_size
        return max(1, round(self.epochs * self.num_examples))

    @property
    def total_steps(self) -> int:
        return -(-self.total_examples // self.batch_size)

    @property
    def steps_per_epoch(self) -> int:
        return max(1, -(-self.num_examples // self.batch_size))

    def indices(self, step: int) -> list[int]:
        """Example indices of a step: consecutive places in an endless row of shuffled epochs."""
        first = step * self.batch_size
        last = min(first + self.batch_size, self.total_examples)
        return [self._at(place) for place in range(first, last)]

    def used(self) -> list[int]:
        """Indices of the examples that some step sees, ascending: a short run need not prepare the others."""
        if self.total_examples >= self.num_examples:
            return list(range(self.num_examples))
        return sorted(index for step in range(self.total_steps) for index in self.indices(step))

    def _at(self, place: int) -> int:
        epoch, offset = divmod(place, self.num_examples)
        return int(_shuffled(self.num_examples, self.seed, epoch)[offset])


_orders: dict[tuple[int, int, int], np.ndarray] = {}


def _shuffled(count: int, seed: int, epoch: int) -> np.ndarray:
    key = (count, seed, epoch)
    if key not in _orders:
        if len(_orders) > 3:  # a step touches at most a few epochs; older ones are never needed again
            _orders.clear()
        _orders[key] = np.random.default_rng([seed, epoch]).permutation(count)
    return _orders[key]

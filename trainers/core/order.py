"""Which examples each optimizer step sees: a pure function of (seed, step), so resuming needs no state."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np

LARGEST_TABLE = 2**20
"""Things that are shuffled in a table of 4 MB; more are shuffled by a keyed function, which needs no memory at all."""

ROUNDS = 6
"""Of the keyed function. Four are enough for one whose halves cannot be told from random ones (Luby and Rackoff 1988)."""


def shuffled(count: int, key: Sequence[int], offsets: np.ndarray) -> np.ndarray:
    """What stands at these offsets, (N,), of a random order of ``range(count)``, which the key decides: (N,) int64."""
    if count <= LARGEST_TABLE:
        return _table(count, tuple(key))[offsets].astype(np.int64)
    return _enciphered(count, tuple(key), offsets)


def shuffled_nearby(count: int, window: int, key: Sequence[int], offsets: np.ndarray) -> np.ndarray:
    """The same of an order in which nothing leaves its window: the first ``window`` things, the next, and so on."""
    found = np.empty_like(offsets)
    windows = offsets // window
    for number in np.unique(windows).tolist():
        here, first = windows == number, number * window
        size = min(window, count - first)
        found[here] = first + shuffled(size, (*key, number), offsets[here] - first)
    return found


@lru_cache(maxsize=32)
def _table(count: int, key: tuple[int, ...]) -> np.ndarray:
    return np.random.default_rng(key).permutation(count).astype(np.int32)


def _enciphered(count: int, key: tuple[int, ...], offsets: np.ndarray) -> np.ndarray:
    """A Feistel cipher of the smallest even number of bits; what falls outside is enciphered again until it falls inside.

    As it is a bijection, walking on from a number inside leads back inside, and to a number that no other leads to.
    """
    half = np.uint64(((count - 1).bit_length() + 1) // 2)
    keys = np.random.default_rng(key).integers(0, 2**64, ROUNDS, dtype=np.uint64)
    found = offsets.astype(np.uint64)
    outside = np.ones(len(found), dtype=bool)
    while outside.any():
        found[outside] = _feistel(found[outside], half, keys)
        outside = found >= count
    return found.astype(np.int64)


def _feistel(values: np.ndarray, half: np.uint64, keys: np.ndarray) -> np.ndarray:
    mask = (np.uint64(1) << half) - np.uint64(1)
    left, right = values >> half, values & mask
    for key in keys:
        left, right = right, left ^ (_mixed(right + key) & mask)
    return (left << half) | right


def _mixed(values: np.ndarray) -> np.ndarray:
    """The finalizer of SplitMix64 (Steele et al. 2014): every bit of a number changes about half of the result's."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


@dataclass(frozen=True)
class BatchOrder:
    """Consecutive places in an endless row of shuffled passes over all examples."""

    num_examples: int
    """Of one pass (an epoch)."""
    batch_size: int
    epochs: float
    max_steps: int | None
    seed: int
    window: int | None = None
    """Examples that are shuffled with one another; None: all."""

    @property
    def total_examples(self) -> int:
        if self.max_steps is not None:
            return self.max_steps * self.batch_size
        return max(1, round(self.epochs * self.num_examples))

    @property
    def total_steps(self) -> int:
        return -(-self.total_examples // self.batch_size)

    def ends_epoch(self, step: int) -> bool:
        """Whether the last example of a pass over all of them is among a step's."""
        first, last = self.places(step)
        return last // self.num_examples > first // self.num_examples

    def places(self, step: int) -> tuple[int, int]:
        """A step's first place, and the one behind its last."""
        first = step * self.batch_size
        return first, min(first + self.batch_size, self.total_examples)

    def indices(self, step: int) -> list[int]:
        """Example indices of a step."""
        found: list[int] = self.at(np.arange(*self.places(step)))[1].tolist()
        return found

    def at(self, places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(pass, index of the example) at these places of the endless row: (N,) each."""
        passes, offsets = np.divmod(places, self.num_examples)
        indices = np.empty_like(offsets)
        for number in np.unique(passes).tolist():
            here = passes == number
            indices[here] = self._shuffled((self.seed, number), offsets[here])
        return passes, indices

    def _shuffled(self, key: tuple[int, ...], offsets: np.ndarray) -> np.ndarray:
        if self.window is None:
            return shuffled(self.num_examples, key, offsets)
        return shuffled_nearby(self.num_examples, self.window, key, offsets)

    def first_batches(self) -> range:
        """The steps until every example that some step sees has been seen: a short run prepares no others."""
        return range(min(self.total_steps, -(-self.num_examples // self.batch_size)))


@dataclass(frozen=True)
class Part:
    """A source of a mixture."""

    size: int
    """Rows, or examples."""
    epochs: float = 1.0
    weight: float | None = None


@dataclass(frozen=True)
class Mixture:
    """How many examples of each source a pass has, and which.

    Without weights a source gives every row ``epochs`` times. With weights the sources' examples are in proportion to
    them, and the pass ends before any source has given a row more often than ``epochs`` times. A pass that does not take
    all of a source's rows goes on, in an order of the source's own, where the pass before it has stopped.
    """

    parts: tuple[Part, ...]
    seed: int

    @cached_property
    def counts(self) -> list[int]:
        """Examples of each source in one pass."""
        if all(part.weight is None for part in self.parts):
            return [max(round(part.epochs * part.size), min(part.size, 1)) for part in self.parts]
        weights = [part.weight or 0.0 for part in self.parts]
        length = min(part.epochs * part.size / weight for part, weight in zip(self.parts, weights, strict=True))
        return [max(1, int(length * weight + 1e-6)) for weight in weights]

    @property
    def size(self) -> int:
        return sum(self.counts)

    def at(self, passes: np.ndarray, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """For these examples of these passes, (N,): source, row in the source, and how often the row was there before."""
        starts = np.concatenate([[0], np.cumsum(self.counts)])
        source = np.searchsorted(starts, indices, side="right") - 1
        row, before = np.empty_like(indices), np.empty_like(indices)
        for number in np.unique(source).tolist():
            here = source == number
            count, size = self.counts[number], self.parts[number].size
            places = passes[here] * count + indices[here] - starts[number]
            before[here], row[here] = np.divmod(places, size)
            if count % size:
                row[here] = self._own_order(number, before[here], row[here])
        return source, row, before

    def _own_order(self, source: int, rounds: np.ndarray, offsets: np.ndarray) -> np.ndarray:
        found = np.empty_like(offsets)
        for number in np.unique(rounds).tolist():
            here = rounds == number
            key = (self.seed, number, source + 1)
            found[here] = shuffled(self.parts[source].size, key, offsets[here])
        return found

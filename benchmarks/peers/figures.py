"""What was measured of each kind of work, and the figures that follow from it."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from math import isnan
from statistics import median
from typing import Any

WARM_UP = 2
"""Steps at the start that are left out: they import, allocate and look things up."""
BEHIND = 0.995
"""Below this a ratio is below 1 as it is printed."""
PROCESSOR, CLOCK = 0, 1
"""Columns of a mark: seconds of each."""


@dataclass
class Side:
    """What one program did of a kind of work: its rounds."""

    rounds: list[dict[str, Any]] = field(default_factory=list)

    def rates(self, column: int) -> list[float]:
        """Tokens per second of the processor or of the clock, of each round."""
        return [_rate(found["marks"], column) for found in self.rounds]

    @property
    def peak(self) -> float:
        return median(found["peak"] for found in self.rounds)

    @property
    def held(self) -> float:
        """Megabytes before the work began."""
        return median(found["held"] for found in self.rounds)

    def start(self, column: int) -> float:
        """Seconds from the start of the program to the end of its first step, imports included."""
        return median(
            found["marks"][0][column] - found["began"][column] + found["imports"][column] for found in self.rounds
        )

    @property
    def losses(self) -> list[float]:
        """Of the steps, as the first round had them."""
        return list(self.rounds[0]["losses"])

    def split(self) -> dict[str, float]:
        """Shares of the steps, the largest first."""
        sums: dict[str, float] = {}
        for part in (part for found in self.rounds for part in found["parts"][WARM_UP:]):
            for name, seconds in part.items():
                sums[name] = sums.get(name, 0) + seconds
        whole = sum(sums.values())
        return {name: sums[name] / whole for name in sorted(sums, key=sums.__getitem__, reverse=True)}


@dataclass
class Work:
    """A kind of training at one size of batch."""

    kind: str
    batch: int
    sides: dict[str, Side]
    """By name, ours first."""
    roofs: dict[str, float] = field(default_factory=dict)
    """Tokens per second if there were nothing but products, by what multiplies."""

    @property
    def ours(self) -> Side:
        return self.sides["ours"]

    @property
    def theirs(self) -> dict[str, Side]:
        return {name: side for name, side in self.sides.items() if name != "ours"}

    def best(self, column: int) -> tuple[str, Side]:
        """The fastest of theirs, and its name."""
        return max(self.theirs.items(), key=lambda item: median(item[1].rates(column)))

    def ratios(self, column: int) -> list[float]:
        """Ours to the best of theirs, round by round: what is noise to both falls out of it."""
        other = self.best(column)[1].rates(column)
        return [own / its for own, its in zip(self.ours.rates(column), other, strict=True)]

    def residual(self) -> float:
        """The largest difference of a step's losses, as a share, between ours and those that had the same rows."""
        shares = [
            abs(own - its) / max(1.0, abs(its))
            for name, side in self.theirs.items()
            if "grouped" not in name
            for own, its in zip(self.ours.losses, side.losses, strict=True)
        ]
        return max(shares, key=lambda share: (isnan(share), share))


@dataclass
class Sampled:
    """Sampling alone at one number of rows, ours beside transformers' ``generate``."""

    batch: int
    lengths: str
    sides: dict[str, list[list[float]]]
    """Rounds of (tokens per second of the processor, of the clock, tokens), by side."""
    roofs: dict[str, float]

    def rates(self, name: str, column: int) -> list[float]:
        return [found[column] for found in self.sides[name]]

    def ratios(self, column: int) -> list[float]:
        return [own / its for own, its in zip(self.rates("ours", column), self.rates("generate", column), strict=True)]


def peer_wins(works: Iterable[Work], sampled: Iterable[Sampled], column: int, names: dict[str, str]) -> list[str]:
    """Each figure in which ours is behind by a hundredth or more, in words."""
    found = []
    for work in works:
        what, other = f"{names[work.kind]} at {work.batch}", work.best(column)[1]
        found += [f"{what}: {text}" for text in (*_slower(work), *_dearer(work.ours, other))]
    for row in sampled:
        found += [f"sampling, {row.batch} rows, {row.lengths}: {text}" for text in _slower(row)]
    return found


def _slower(row: Work | Sampled) -> Iterator[str]:
    for measure, column in (("tokens per CPU-second", PROCESSOR), ("tokens per second", CLOCK)):
        if (ratio := median(row.ratios(column))) < BEHIND:
            yield f"{measure}, {ratio:.2f} of the peer's"


def _dearer(ours: Side, theirs: Side) -> Iterator[str]:
    for measure, own, its in (
        ("peak memory", ours.peak, theirs.peak),
        ("CPU-seconds to the first step", ours.start(PROCESSOR), theirs.start(PROCESSOR)),
        ("seconds to the first step", ours.start(CLOCK), theirs.start(CLOCK)),
    ):
        if its < own * BEHIND:
            yield f"{measure}, {own / its:.2f} times the peer's"


def _rate(marks: list[list[float]], column: int) -> float:
    first, last = marks[WARM_UP - 1], marks[-1]
    return (last[2] - first[2]) / (last[column] - first[column])

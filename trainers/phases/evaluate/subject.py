"""A model as benchmarks see it: what they can ask of it, and the answers. Imports no torch."""

from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any, Protocol, TypeVar

from trainers.phases.evaluate.settings import BenchmarkRows
from trainers.spec import Sampling

Row = dict[str, Any]

CUT = " […]"
"""Stands where a response was cut off at the length limit."""


@dataclass(frozen=True)
class Reply:
    text: str
    ids: list[int]
    """Generated tokens, the end token included."""
    ended: bool
    """Whether it stopped by itself rather than at the length limit."""
    shortened: int = 0
    """Tokens that the prompt had lost, because it was too long."""

    @property
    def length(self) -> int:
        return len(self.ids)

    @property
    def shown(self) -> str:
        """What is judged. A response that was cut off does not end where it was cut: no pattern may take that for an end."""
        return self.text if self.ended else self.text + CUT


@dataclass(frozen=True)
class Loss:
    nll: float
    """Negative log-likelihood of the row's scored tokens, in nats."""
    tokens: int
    shortened: int = 0
    """Tokens that its prompts had lost, because they were too long."""


@dataclass(frozen=True)
class Divergence:
    kl: float
    """KL(model || reference), summed over the response's tokens, in nats."""
    tokens: int


class Subject(Protocol):
    """``data`` and ``sampling`` default to the evaluation's. What is expensive is measured once, however often asked for.

    There may be more rows than memory has room for: keep numbers of them alone (:func:`columns`), or look at some at a
    time (:func:`in_blocks`).
    """

    label: str

    @property
    def baseline(self) -> "Subject | None":
        """The model to compare with; None while measuring, and for the baseline itself."""

    @property
    def has_reward_model(self) -> bool: ...

    def pause(self) -> None:
        """A place to stop, if that was asked for. Raises Interrupted."""

    def answered(self, data: BenchmarkRows | None, sampling: Sampling | None) -> Iterator[tuple[Row, Reply]]:
        """Every row with the model's response."""

    def rewards(self, data: BenchmarkRows | None, sampling: Sampling | None) -> Iterator[float]:
        """The reward model's scores of the responses."""

    def divergences(self, data: BenchmarkRows | None, sampling: Sampling | None) -> Iterator[Divergence]:
        """KL to the reference on the responses. Raises NotComparable for a model with other tokens."""

    def losses(self, data: BenchmarkRows | None) -> Iterator[Loss]:
        """Losses on the rows' own responses."""


T = TypeVar("T")


def in_blocks(items: Iterable[T], size: int = 512) -> Iterator[list[T]]:
    rest = iter(items)
    while block := list(islice(rest, size)):
        yield block


def columns(rows: Iterable[tuple[float, ...]], count: int) -> list["array[float]"]:
    """What rows of so many numbers have in each place: eight bytes a number."""
    found = [array("d") for _ in range(count)]
    for row in rows:
        for column, value in zip(found, row, strict=True):
            column.append(value)
    return found


class NotComparable(Exception):
    """A benchmark cannot be run for this model; the message says why and goes into the results."""

"""What every benchmark has: settings, a name in the registry, and a function from a :class:`Bench` to metrics.

Imports no torch, because a run is read without it.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import AfterValidator, Field

from trainers.phases.evaluate.metric import Metric
from trainers.spec import MAX_SOURCES, DataSource, RowPolicy, Sampling, SpecModel

if TYPE_CHECKING:
    from trainers.phases.evaluate.bench import Bench


def _compiles(pattern: str) -> str:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{pattern!r} is not a regular expression: {error}") from error
    return pattern


Pattern = Annotated[str, AfterValidator(_compiles)]


class BenchmarkRows(RowPolicy):
    """Held-out rows."""

    rows: tuple[DataSource, ...] = Field(min_length=1, max_length=MAX_SOURCES)
    """Rows with the keys that the benchmark needs: `prompt` (or chat `messages`) and, by benchmark, more."""
    max_prompt_length: int = Field(default=512, ge=1)
    """Tokens; a longer prompt loses its left end, so that all models answer the same rows."""


class BenchmarkSpec(SpecModel):
    """Settings of every benchmark."""

    data: BenchmarkRows | None = None
    """Rows; the evaluation's `data` unless set."""


class SampledSpec(BenchmarkSpec):
    """Settings of benchmarks on the model's own responses."""

    sampling: Sampling | None = None
    """How responses are generated; the evaluation's `sampling` unless set. Equal settings share their responses."""


@dataclass(frozen=True)
class Benchmark:
    """An entry of the registry."""

    name: str
    """The member's name in a run: lower case, one word."""
    spec: type[BenchmarkSpec]
    run: Callable[[Any, "Bench"], list[Metric]]
    """Takes the settings and a model on the bench. Called more than once; what is expensive is remembered by the bench."""
    needs_reward_model: bool = False
    needs_reference: bool = False


class NotComparable(Exception):
    """A benchmark cannot be run for this model; the message says why and goes into the results."""

"""Settings that benchmarks share. Imports no torch, because a run is read without it."""

from pydantic import Field

from trainers.spec import MAX_SOURCES, DataSource, RowPolicy, Sampling, SpecModel


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

"""Where rows come from, and how they are read."""

import re
from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator

from trainers.spec.base import SpecModel

MAX_SOURCES = 32
"""Entries of one list of data; the API server weighs rules by the longest possible input. Shards are one entry: a glob."""


class HubDataset(SpecModel):
    name: str = Field(min_length=1)
    """Dataset id on the Hugging Face hub, or a local folder that `datasets` can load."""
    subset: str | None = None
    """Configuration name, for datasets that have several."""
    split: str = "train"
    """Split, with `datasets` slicing if wanted: `train[:1000]`."""
    revision: str | None = None
    """Commit or tag to pin."""
    streaming: bool = False
    """Take rows as they come instead of downloading the dataset whole, and keep those that steps reach (docs/data.md). Needs `limit`."""
    shuffle_buffer: int = Field(default=10_000, ge=1, le=10_000_000)
    """With `streaming`: rows that are shuffled with one another, the first so many, then the next, in each pass in another way. The first step waits for them."""

    @model_validator(mode="after")
    def _streams_whole_splits(self) -> Self:
        if self.streaming and (wrong := re.search(r"[\[+]", self.split)):
            raise ValueError(
                f"split {self.split!r}: a stream cannot be {'cut' if wrong[0] == '[' else 'joined'} before it is read; "
                "give the name of one split, and limit"
            )
        return self


class SyntheticData(SpecModel):
    task: str
    """Generator in `trainers/synthetic`, for example `letters`."""
    split: str
    """One of the generator's splits."""
    count: int = Field(ge=1)
    """Rows to generate."""
    seed: int = 0
    """Seed of the rows; independent of the run's seed, so all phases see the same task."""


class DataSource(SpecModel):
    """Where rows come from: exactly one of `files`, `hub`, `synthetic`."""

    one_of: ClassVar[tuple[str, ...]] = ("files", "hub", "synthetic")

    files: str | None = None
    """One JSONL file or a glob of shards (`data/train-*.jsonl`, also `.gz`, or one list in a `.json` file); relative paths start at the run file. Or an object store address, `s3://bucket/data/train-*.jsonl`."""
    hub: HubDataset | None = None
    """A Hugging Face dataset."""
    synthetic: SyntheticData | None = None
    """Rows made on the spot by a seeded generator."""
    format: Literal["alpaca", "sharegpt", "messages", "preference-messages", "hh", "prompt-completion"] | None = None
    """Known form of the rows, if it is not the phase's own."""
    columns: dict[str, str] = {}
    """Renames, before the format is read: schema key to the source's column, for example `{prompt: question, response: answer}`."""
    limit: int | None = Field(default=None, ge=1)
    """Use only the first rows."""

    @model_validator(mode="after")
    def _streams_end(self) -> Self:
        if self.is_stream and self.limit is None:
            raise ValueError("limit is missing: how many rows a streamed dataset has is not known before its end")
        return self

    @property
    def is_stream(self) -> bool:
        return self.hub is not None and self.hub.streaming


class MixedSource(DataSource):
    """A source of rows to train on, which may have a share of its own."""

    epochs: float = Field(default=1.0, gt=0, le=1000)
    """Times that a pass over the data has each row; with `weight`, at most."""
    weight: float | None = Field(default=None, gt=0, le=1e6)
    """Share of the examples, in proportion to the other sources' weights (docs/data.md)."""


def check_mixture(where: str, sources: tuple[MixedSource, ...]) -> None:
    """Raise ValueError unless the sources of a list can be mixed."""
    weighed = [source.weight is not None for source in sources]
    if any(weighed) and not all(weighed):
        raise ValueError(
            f"{where}[{weighed.index(False)}]: it has no weight; give all sources of the list one, or none"
        )
    for i, source in enumerate(sources):
        if source.is_stream and (len(sources) > 1 or any(weighed) or source.epochs != 1):
            raise ValueError(
                f"{where}[{i}]: a streamed dataset is not mixed: it stands alone, without weight and epochs"
            )


class RowPolicy(SpecModel):
    """How rows are read, whatever the phase."""

    on_malformed: Literal["stop", "skip"] = "stop"
    """A row that is not valid JSON or lacks a key: `stop` with file and line, or `skip` and count."""
    min_rows: float = Field(default=0.5, ge=0, le=1)
    """Share of the rows that must be usable; with fewer the phase fails."""

    @property
    def longest_prompt(self) -> int | None:
        """Tokens of the longest prompt that is taken, where it is said; prompts are rarely as long as what is there unless said."""
        return getattr(self, "max_prompt_length", None) if "max_prompt_length" in self.model_fields_set else None


class PromptData(RowPolicy):
    prompts: tuple[MixedSource, ...] = Field(min_length=1, max_length=MAX_SOURCES)
    """Rows `{"prompt"}`; other keys are ignored."""
    max_prompt_length: int = Field(default=512, ge=1)
    """Tokens; longer prompts are dropped and counted."""

    @model_validator(mode="after")
    def _can_be_mixed(self) -> Self:
        check_mixture("prompts", self.prompts)
        return self


class TrainData(RowPolicy):
    train: tuple[MixedSource, ...] = Field(min_length=1, max_length=MAX_SOURCES)
    """Training rows."""
    eval: tuple[DataSource, ...] = Field(default=(), max_length=MAX_SOURCES)
    """Held-out rows, scored during training and at the end."""
    max_length: int = Field(default=1024, ge=8)
    """Tokens per sequence. Longer ones lose the left end of the prompt, or are dropped and counted when the response alone is too long."""
    packing: bool = True
    """Put several sequences in one row without letting them attend to each other, instead of padding."""

    @model_validator(mode="after")
    def _can_be_mixed(self) -> Self:
        check_mixture("train", self.train)
        return self

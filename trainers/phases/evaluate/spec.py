"""What a user can set for evaluation."""

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, Self

from pydantic import Field, PositiveInt, create_model, model_validator

from trainers.phases.evaluate.benchmark import Benchmark
from trainers.phases.evaluate.benchmarks import REGISTRY
from trainers.phases.evaluate.settings import BenchmarkRows, BenchmarkSpec, SampledSpec
from trainers.spec import (
    ModelRef,
    NamedModel,
    OwnServer,
    PhaseSpec,
    RewardModelRef,
    Sampling,
    SpecModel,
    check_engine,
    check_prompts,
    require_one,
    shown_labels,
)

LATENCY = "latency"
LATENCY_METRICS = (
    *(f"{time}P{q}" for time in ("timeToFirstToken", "timePerOutputToken") for q in (50, 95, 99)),
    "tokensPerSecond", "peakMemoryBytes", "parameters",
)  # fmt: skip


class EntryBase(SpecModel):
    """A benchmark with a name of its own: exactly one member, named after the kind."""

    name: str = Field(max_length=63, pattern=r"^[a-z0-9-]+$")
    """First part of its metrics' names."""
    headline: bool = True
    """Show its main figures in the short table."""

    @property
    def benchmark(self) -> Benchmark:
        return next(kind for kind in REGISTRY if getattr(self, kind.name) is not None)

    @property
    def settings(self) -> BenchmarkSpec:
        settings: BenchmarkSpec = getattr(self, self.benchmark.name)
        return settings

    @model_validator(mode="after")
    def _one_kind(self) -> Self:
        require_one(self, *(kind.name for kind in REGISTRY))
        return self


if TYPE_CHECKING:
    BenchmarkEntry = EntryBase
else:
    # The members come from the registry, so that a new benchmark is one file and one line.
    _members: dict[str, Any] = {
        kind.name: (kind.spec | None, Field(default=None, description=(kind.spec.__doc__ or "").split("\n")[0]))
        for kind in REGISTRY
    }
    BenchmarkEntry = create_model("BenchmarkEntry", __base__=EntryBase, __doc__=EntryBase.__doc__, **_members)


class LatencySpec(SpecModel):
    """Time to the first token and between tokens, one batch after the other (closed loop), greedy, never ending early."""

    enabled: bool = True
    """Measure it."""
    prompt_lengths: tuple[PositiveInt, ...] = Field(default=(64,), min_length=1)
    """Tokens per prompt; random ones, as the time does not depend on what they say."""
    new_tokens: int = Field(default=32, ge=2)
    """Tokens per response."""
    batch_sizes: tuple[PositiveInt, ...] = Field(default=(1, 8), min_length=1)
    """Responses generated side by side."""
    repeats: int = Field(default=5, ge=1)
    """Measured batches per size."""
    warmup: int = Field(default=1, ge=0)
    """Batches before them that do not count."""


class EvaluateSpec(PhaseSpec):
    """Every model on every benchmark, with 95 % intervals, and its latency."""

    models: tuple[NamedModel, ...] = ()
    """Models to compare; all models of the run unless set."""
    baseline: str | None = None
    """Name of the model that win rates and differences refer to."""
    reference: ModelRef | None = None
    """Model that the KL is measured to; the baseline unless set."""
    reward_model: RewardModelRef | None = None
    """Scores responses."""
    data: BenchmarkRows | None = None
    """Rows of the benchmarks that set none of their own."""
    sampling: Sampling = Sampling()
    """Generation settings of the benchmarks that set none of their own."""
    server: OwnServer | None = None
    """How the phase starts a vLLM for each model without a `url`, with `engine: vllm`."""
    benchmarks: tuple[BenchmarkEntry, ...] = Field(default=(), max_length=32)
    """What is measured."""
    latency: LatencySpec = LatencySpec()
    """How speed is measured."""

    @model_validator(mode="after")
    def _names(self) -> Self:
        names = [entry.name for entry in self.benchmarks]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"benchmarks: the name {name!r} is used more than once")
        if LATENCY in names:
            raise ValueError(f"benchmarks: the name {LATENCY!r} is taken by the latency measurement")
        labels = shown_labels(self.models)
        if self.models and self.baseline is not None and self.baseline not in labels:
            raise ValueError(f"baseline {self.baseline!r} is none of the models ({', '.join(labels)})")
        return self

    @model_validator(mode="after")
    def _needs(self) -> Self:
        for entry in self.benchmarks:
            kind = entry.benchmark
            place = f"benchmark {entry.name!r} ({kind.name})"
            if entry.settings.data is None and self.data is None:
                raise ValueError(f"{place} has no rows: set its data, or the evaluation's data")
            if kind.needs_reward_model and self.reward_model is None:
                raise ValueError(f"{place} needs rewardModel")
            if kind.needs_reference and self.reference is None and self.baseline is None:
                raise ValueError(f"{place} needs reference, or baseline")
        return self

    @model_validator(mode="after")
    def _engines(self) -> Self:
        check_engine(self._samplings(), ((f"models[{i}]", m) for i, m in enumerate(self.models)), self.server)
        for entry in self.benchmarks:
            settings = entry.settings
            if isinstance(settings, SampledSpec) and (data := settings.data or self.data) is not None:
                place = "data" if settings.data is None else f"benchmarks[{entry.name}].{entry.benchmark.name}.data"
                check_prompts(self.server, place, data, settings.sampling or self.sampling)
        return self

    def _samplings(self) -> list[Sampling]:
        sampled = [entry.settings for entry in self.benchmarks if isinstance(entry.settings, SampledSpec)]
        return [settings.sampling or self.sampling for settings in sampled] or [self.sampling]

    @property
    def starts_server(self) -> bool:
        served = any(sampling.engine == "vllm" for sampling in self._samplings())
        return served and any(model.url is None for model in self.models)

    def row_schemas(self) -> Mapping[str, str]:
        return {"data": "prompt", "benchmarks": "prompt"}

    def final_metrics(self) -> tuple[str, ...]:
        """Of the models that are named: a run fills in all of its own (:func:`controller.plan.resolve.resolve`)."""
        return tuple(name for label in shown_labels(self.models) for name in self._of_model(label))

    def _of_model(self, label: str) -> Iterator[str]:
        for entry in self.benchmarks:
            kind = entry.benchmark
            rewarded = kind.reward_metrics if self.reward_model is not None else ()
            compared = kind.baseline_metrics if self.baseline not in (None, label) else ()
            yield from (f"{label}/{entry.name}/{key}" for key in (*kind.metrics, *rewarded, *compared))
        if self.latency.enabled:
            yield from (f"{label}/{LATENCY}/{key}" for key in LATENCY_METRICS)

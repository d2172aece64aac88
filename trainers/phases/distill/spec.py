"""What a user can set for distillation."""

from collections.abc import Iterator, Mapping
from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator

from trainers.spec import (
    DataSource,
    Evaluation,
    Lora,
    ModelRef,
    NamedTeacher,
    OnPolicySpec,
    PromptData,
    RewardModelRef,
    Sampling,
    SpecModel,
    TeacherRef,
    TracesRef,
    TrainingSpec,
    check_prompts,
)


class StudentRef(ModelRef):
    """The model to train: exactly one of `phase`, `source`, `scratch`, `teacherLayers`."""

    one_of: ClassVar[tuple[str, ...]] = ("phase", "source", "scratch", "teacher_layers")

    teacher_layers: tuple[int, ...] | None = Field(default=None, min_length=1)
    """Start from the teacher with only these decoder layers kept (0 is the first); embeddings and head are the teacher's."""

    @model_validator(mode="after")
    def _layers_ascend(self) -> Self:
        layers = self.teacher_layers
        if layers is not None and (list(layers) != sorted(set(layers)) or layers[0] < 0):
            raise ValueError(f"teacherLayers {list(layers)} must be ascending, without repeats, and not negative")
        return self


class RewardWeighting(SpecModel):
    """How much each response counts. Weights are positive and average 1 over a batch; a raw, possibly negative reward never multiplies a divergence."""

    mode: Literal["none", "exp", "softmax", "rank", "filter"] = "exp"
    """`exp`: exp((r - mean) / (temperature x std)); `softmax`: n softmax(r / temperature); `rank`: linear in rank; `filter`: 1 above the quantile, else 0."""
    own_samples: Literal["equal", "reward", "mistakes"] = "equal"
    """Weights of the student's own samples, which the teacher corrects: all `equal`; by `reward` as traces are, which mutes the samples that need correction most; or `mistakes`, the lower the reward the higher the weight."""
    temperature: float = Field(default=1.0, gt=0)
    """Higher is closer to equal weights (`exp`, `softmax`)."""
    min_weight: float = Field(default=0.1, ge=0)
    """Lower clip before normalising (`exp`)."""
    max_weight: float = Field(default=5.0, gt=0)
    """Upper clip before normalising (`exp`)."""
    quantile: float = Field(default=0.5, ge=0, lt=1)
    """Share of responses that `filter` drops."""

    @model_validator(mode="after")
    def _clips_ordered(self) -> Self:
        if self.min_weight > self.max_weight:
            raise ValueError(f"minWeight {self.min_weight} is above maxWeight {self.max_weight}")
        return self


class DistillSpec(OnPolicySpec, TrainingSpec):
    """Distillation of a teacher into a student on stored teacher traces and the student's own samples."""

    teacher: TeacherRef | None = None
    """Model to learn from, here or on a server. It may be left out where traces hold its log-probabilities (`teacherTopK` of the rollout that made them), and is not in memory then."""
    teachers: tuple[NamedTeacher, ...] = Field(default=(), max_length=16)
    """Several teachers on servers, in place of `teacher`: a row is learned from the one that its `teacher` names (`columns` can say another key)."""
    student: StudentRef
    """Model to train."""
    traces: TracesRef | None = None
    """Stored teacher responses, the off-policy part."""
    prompts: PromptData | None = None
    """Prompts that the student responds to, the on-policy part."""
    reward_model: RewardModelRef | None = None
    """Scores the student's samples, for their weights."""
    on_policy_fraction: float = Field(default=0.5, ge=0, le=1)
    """Share of optimizer steps that use the student's own samples (lambda of GKD, Agarwal et al. 2024)."""
    divergence_beta: float = Field(default=0.0, ge=0, le=1)
    """Generalized Jensen-Shannon divergence: 0 is forward KL(teacher || student), 1 is reverse KL, between them JSD (not scaled at its ends)."""
    temperature: float = Field(default=1.0, ge=0.001)
    """Divides both models' logits in the divergence."""
    weighting: RewardWeighting = RewardWeighting()
    """Reward weights."""
    sampling: Sampling = Sampling()
    """How the student's own responses are generated."""
    max_length: int = Field(default=1024, ge=8)
    """Tokens per sequence."""
    lora: Lora | None = None
    """Train low-rank adapters of the student instead of all weights."""
    packing: bool = True
    """Put several sequences in one row without letting them attend to each other."""

    @model_validator(mode="after")
    def _streams_have_sources(self) -> Self:
        if self.on_policy_fraction < 1 and self.traces is None:
            raise ValueError(
                f"onPolicyFraction {self.on_policy_fraction} leaves steps that need stored traces: set traces, or onPolicyFraction: 1"
            )
        if self.on_policy_fraction > 0 and self.prompts is None:
            raise ValueError(
                f"onPolicyFraction {self.on_policy_fraction} needs prompts for the student: set prompts, or onPolicyFraction: 0"
            )
        if self.reads_scores:
            self._check_without("a teacher: set teacher", self.on_policy_fraction > 0)
        elif not self.loads_teacher:
            self._check_without("a teacher that is loaded here: set teacher.phase or teacher.source", False)
        weighed = self.weighting.mode != "none" and self.weighting.own_samples != "equal"
        if self.on_policy_fraction > 0 and weighed and self.reward_model is None:
            raise ValueError(
                f"weighting.ownSamples {self.weighting.own_samples} needs rewardModel to score the student's samples: set it, or ownSamples: equal"
            )
        return self

    def _check_without(self, what: str, samples: bool) -> None:
        """Raise ValueError for what log-probabilities of some tokens cannot answer; ``samples``: nor of the student's samples."""
        for name, needed, instead in (
            (f"onPolicyFraction {self.on_policy_fraction:g}", samples, "onPolicyFraction: 0"),
            (f"temperature {self.temperature:g}", self.temperature != 1, "temperature: 1, which they are of"),
            ("student.teacherLayers", self.student.teacher_layers is not None, "another student"),
        ):
            if needed:
                raise ValueError(f"{name} needs {what}, or {instead}")

    @model_validator(mode="after")
    def _settings_apply(self) -> Self:
        if self.evaluation != Evaluation():
            raise ValueError(
                "evaluation has no effect here, distillation has no held-out rows: leave it out and use an evaluate phase"
            )
        if self.sampling.max_new_tokens >= self.max_length and self.on_policy_fraction > 0:
            raise ValueError(
                f"sampling.maxNewTokens {self.sampling.max_new_tokens} leaves no room for a prompt in maxLength {self.max_length}"
            )
        return self

    @model_validator(mode="after")
    def _server_takes_prompts(self) -> Self:
        if self.prompts is not None and self.on_policy_fraction > 0:
            check_prompts(self.server, "prompts", self.prompts, self.sampling, most=self.max_length)
        return self

    @model_validator(mode="after")
    def _teachers_differ(self) -> Self:
        if self.teachers and self.teacher is not None:
            raise ValueError("teacher and teachers: set one of them")
        names = [teacher.name for teacher in self.teachers]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"teachers: the name {name!r} is used more than once")
        if len(kept := {teacher.top_k for teacher in self.teachers}) > 1:
            raise ValueError(f"teachers: topK is {' and '.join(map(str, sorted(kept)))}: set the same for all")
        return self

    @property
    def starts_server(self) -> bool:
        return super().starts_server and self.on_policy_fraction > 0

    @property
    def loads_teacher(self) -> bool:
        return self.teacher is not None and self.teacher.url is None

    @property
    def reads_scores(self) -> bool:
        """Whether traces hold what a teacher says."""
        return self.teacher is None and not self.teachers

    def data_sources(self) -> Iterator[tuple[str, DataSource]]:
        """The traces too when they are files, so that they are checked, and a change of their content is noticed."""
        yield from super().data_sources()
        if self.traces is not None and self.traces.files is not None:
            yield "traces[0]", DataSource(files=self.traces.files)

    def row_schemas(self) -> Mapping[str, str]:
        return {"prompts": "prompt"}

    def final_metrics(self) -> tuple[str, ...]:
        streams = {"offPolicy": self.on_policy_fraction < 1, "onPolicy": self.on_policy_fraction > 0}
        last = [f"{stream}{figure}Last" for stream, runs in streams.items() if runs for figure in ("Kl", "Reward")]
        return (*last, "parameters", *(["teacherParameters"] if self.loads_teacher else []))

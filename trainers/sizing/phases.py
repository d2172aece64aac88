"""What each phase type loads, trains and generates with, as bytes of one device."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from trainers.phases.distill.spec import DistillSpec, StudentRef
from trainers.phases.dpo.spec import DpoSpec
from trainers.phases.evaluate.settings import SampledSpec
from trainers.phases.evaluate.spec import EvaluateSpec
from trainers.phases.ppo.spec import PpoSpec
from trainers.phases.reward.spec import RewardSpec
from trainers.phases.rollout.spec import RolloutSpec
from trainers.phases.sft.spec import SftSpec
from trainers.sizing.memory import (
    BF16,
    FP32,
    Frozen,
    Memory,
    Place,
    Trained,
    activations,
    forward_alone,
    generation,
    head_bytes,
    head_copy,
    held_frozen,
    held_trained,
    largest,
)
from trainers.sizing.servers import ServerSize, server_size
from trainers.sizing.shapes import ModelShape
from trainers.spec import ArtifactRef, Lora, Optim, OwnServer, PhaseSpec, Sampling

ShapeOf = Callable[[ArtifactRef], ModelShape]
"""The shape of the model that a reference means. Raises UnknownSize."""

SCORES, DIVERGENCE, STORED = 2, 4, 5
"""Tensors of a chunk of logits that are there at once: its logits, and their log-probabilities, which become the gradient; of
a divergence both models' and its terms; of a divergence from stored scores the student's alone, by autograd."""


PAIR = 2
"""Sequences of a preference row."""


@dataclass(frozen=True)
class Needs:
    memory: Memory
    models: tuple[tuple[str, int], ...]
    """Parameters of what is loaded, by its field in the phase."""
    activations_known: bool = True
    """Else what layers keep is not counted: state spaces, linear attention."""
    server: ServerSize | None = None
    """A vLLM that the phase starts."""

    @property
    def known(self) -> bool:
        """Else this is the least of it."""
        return self.activations_known and (self.server is None or self.server.known or self.server.apart)

    @property
    def starved(self) -> bool:
        """Whether its vLLM would not start with what it may take."""
        return self.server is not None and self.server.starved


class _Tally:
    """Adds up what a phase has in memory."""

    def __init__(self, place: Place, shape_of: ShapeOf) -> None:
        self.place, self.shape_of = place, shape_of
        self.memory = Memory()
        self.models: list[tuple[str, int]] = []
        self.known = True
        self.server: ServerSize | None = None

    def needs(self) -> Needs:
        return Needs(self.memory, tuple(self.models), self.known, self.server)

    def add(self, memory: Memory) -> None:
        self.memory = self.memory + memory

    def named(self, name: str, shape: ModelShape) -> ModelShape:
        self.models.append((name, shape.parameters))
        return shape

    def held(self, ref: ArtifactRef, trained: bool) -> int:
        """Bytes of a weight (ADR 6): trained ones are fp32, frozen ones in the type of the arithmetic, unless it is said."""
        dtype = getattr(ref, "dtype", "auto")
        if dtype == "auto":
            return FP32 if trained else self.place.number
        return BF16 if dtype == "bf16" else FP32

    def train(
        self, name: str, ref: ArtifactRef, shape: ModelShape, optim: Optim, tokens: int, row: int, packed: bool,
        lora: Lora | None = None, head: int = SCORES, beside: int = 0,
    ) -> Trained:  # fmt: skip
        moment = BF16 if optim.state_dtype == "bf16" else FP32
        head = head if shape.language_head else 0
        model = Trained(self.named(name, shape), lora, self.held(ref, lora is None), moment, head, beside)
        self.add(held_trained(self.place, model))
        self.add(Memory(activations=activations(self.place, model, tokens, row, packed and self.place.masks)))
        self.known = self.known and (shape.activations_known or self.place.parallel.gradient_checkpointing)
        return model

    def freeze(self, name: str, ref: ArtifactRef, held: int | None = None) -> ModelShape:
        """``held``: as another model is, unless the reference says how."""
        shape = self.named(name, self.shape_of(ref))
        alike = held if held is not None and getattr(ref, "dtype", "auto") == "auto" else None
        self.add(held_frozen(self.place, Frozen(shape, alike or self.held(ref, trained=False))))
        return shape

    def pass_by(self, name: str, ref: ArtifactRef, held: int, tokens: int, row: int) -> None:
        """A model that scores rows before any is trained on, and is gone then: it is there instead of gradients."""
        alone = _Tally(self.place, self.shape_of)
        shape = alone.freeze(name, ref, held)
        self.models += alone.models
        there = alone.memory.frozen + alone.memory.exchange
        self.add(Memory(cache=there + forward_alone(self.place, shape, tokens, row)))

    def serve(self, shape: ModelShape, own: OwnServer | None) -> None:
        """A vLLM that has the model. Processes of a processor share what it takes of their machine."""
        place = self.place
        size = server_size(place.server, shape, place.number, own or OwnServer())
        self.keep(size)
        if not size.apart:
            self.add(Memory(vllm=size.taken // (1 if place.gpu else place.procs_per_node)))

    def keep(self, size: ServerSize | None) -> None:
        """Of servers one after the other the one that needs most."""
        self.server = max(
            (found for found in (self.server, size) if found is not None), key=lambda found: found.least, default=None
        )

    def score(self, shape: ModelShape, tokens: int, row: int) -> None:
        """Forward passes without gradients."""
        self.add(Memory(cache=forward_alone(self.place, shape, tokens, row)))

    def generate(
        self, shape: ModelShape, held: int, sampling: Sampling, responses: int, prompt: int, split: bool
    ) -> None:
        self.add(Memory(cache=self._generation(shape, held, sampling, responses, prompt, split)))

    def generate_own(self, spec: PpoSpec | DistillSpec, model: Trained, prompt: int) -> None:
        """Responses of what is trained, between its steps; or beside them, by copies of what is trained of it."""
        if spec.starts_server:
            self.serve(model.shape, spec.server)
        split = spec.parallel.splits_weights and self.place.world > 1
        cache = self._generation(model.shape, model.held, spec.sampling, spec.batch_size, prompt, split)
        ahead = spec.staleness if spec.sampling.engine == "own" else 0  # a server has what it samples by
        copies = ahead * model.parameters * (model.held if model.lora is None else FP32)
        self.add(Memory(frozen=copies + cache) if ahead else Memory(cache=cache))

    def _generation(
        self, shape: ModelShape, held: int, sampling: Sampling, responses: int, prompt: int, split: bool
    ) -> int:
        if sampling.engine != "own":
            return 0  # a server's cache is its own
        side_by_side = min(sampling.batch_size, -(-responses // self.place.world))
        length = min(prompt + sampling.max_new_tokens, shape.positions)
        nucleus = sampling.top_p < 1 and sampling.temperature > 0
        return generation(self.place, shape, held, side_by_side, min(prompt, length), length, split, nucleus)


def _sft(spec: SftSpec, tally: _Tally) -> None:
    assert spec.model is not None
    _train_on_rows(spec, spec.model, tally.shape_of(spec.model), tally, SCORES)


def _pass_tokens(spec: PhaseSpec, longest: int) -> int:
    """Of the largest forward pass: an example that is longer than passes are has one of its own."""
    return max(spec.parallel.micro_batch_tokens, longest)


def _reward(spec: RewardSpec, tally: _Tally) -> None:
    assert spec.model is not None
    shape = tally.shape_of(spec.model)
    _train_on_rows(spec, spec.model, replace(shape, language_head=False, tied=False), tally, 0, PAIR)


def _train_on_rows(
    spec: Any, ref: ArtifactRef, shape: ModelShape, tally: _Tally, head: int, sequences: int = 1
) -> Trained:
    """``sequences`` of a row, which stay together."""
    row = min(spec.data.max_length, shape.positions)
    tokens = _pass_tokens(spec, sequences * row)
    name = "policy" if hasattr(spec, "policy") else "model"
    return tally.train(name, ref, shape, spec.optim, tokens, row, spec.data.packing, spec.lora, head)


def _dpo(spec: DpoSpec, tally: _Tally) -> None:
    policy = _train_on_rows(spec, spec.policy, tally.shape_of(spec.policy), tally, SCORES, PAIR)
    if spec.reference_scores == "on-the-fly" and (spec.reference is not None or spec.lora is None):
        tally.freeze("reference", spec.reference or spec.policy, policy.held)
    elif spec.reference is not None:
        row = min(spec.data.max_length, policy.shape.positions)
        tally.pass_by("reference", spec.reference, policy.held, _pass_tokens(spec, PAIR * row), row)


def _ppo(spec: PpoSpec, tally: _Tally) -> None:
    shape = tally.shape_of(spec.policy)
    row = min(spec.data.max_prompt_length + spec.sampling.max_new_tokens, shape.positions)
    tokens = _pass_tokens(spec, row)
    head = SCORES + (spec.sampling.temperature not in (0, 1))  # logits divided by it
    policy = tally.train("policy", spec.policy, shape, spec.optim, tokens, row, spec.packing, spec.lora, head)
    reward = tally.freeze("rewardModel", spec.reward_model)
    critic_ref = spec.critic or spec.reward_model
    critic = tally.shape_of(critic_ref)
    tally.train("critic", critic_ref, critic, spec.critic_optim, tokens, row, spec.packing)
    if spec.reference is not None or spec.lora is None:
        tally.freeze("reference", spec.reference or spec.policy, policy.held)
    tally.generate_own(spec, policy, spec.data.max_prompt_length)
    tally.score(reward, tokens, row)


def _rollout(spec: RolloutSpec, tally: _Tally) -> None:
    # Another's server is checked by weights that are here meanwhile; one that the phase starts has read their files.
    if spec.starts_server:
        tally.serve(tally.named("policy", tally.shape_of(spec.policy)), spec.server)
    if spec.sampling.engine == "own" or (spec.policy.url is not None and spec.policy.check_weights):
        shape = tally.freeze("policy", spec.policy)
        held, split = tally.held(spec.policy, trained=False), spec.parallel.splits_frozen and tally.place.world > 1
        many = spec.sampling.batch_size * tally.place.world
        tally.generate(shape, held, spec.sampling, many, spec.data.max_prompt_length, split)
    if spec.reward_model is not None:
        row = spec.data.max_prompt_length + spec.sampling.max_new_tokens
        tally.score(tally.freeze("rewardModel", spec.reward_model), _pass_tokens(spec, row), row)


def _distill(spec: DistillSpec, tally: _Tally) -> None:
    # Without a teacher its log-probabilities are read from files, or a server tells them.
    teacher, beside = None, 0
    if spec.teacher is not None and spec.loads_teacher:
        teacher = tally.freeze("teacher", spec.teacher)
        beside = head_copy(teacher, tally.held(spec.teacher, trained=False))
    shape = _student(spec.student, teacher, tally)
    row = min(spec.max_length, shape.positions)
    tokens = _pass_tokens(spec, row)
    head = STORED if teacher is None else DIVERGENCE
    student = tally.train(
        "student", spec.student, shape, spec.optim, tokens, row, spec.packing, spec.lora, head, beside
    )
    if spec.reward_model is not None:
        tally.freeze("rewardModel", spec.reward_model)
    if spec.on_policy_fraction > 0 and spec.prompts is not None:
        tally.generate_own(spec, student, spec.prompts.max_prompt_length)


def _student(ref: StudentRef, teacher: ModelShape | None, tally: _Tally) -> ModelShape:
    if ref.teacher_layers is None or teacher is None:
        return tally.shape_of(ref)
    return some_layers(teacher, ref.teacher_layers)


def some_layers(shape: ModelShape, layers: tuple[int, ...]) -> ModelShape:
    """The shape of a model with only these decoder layers, of those that there are."""
    return replace(shape, layers=tuple(shape.layers[i] for i in layers if i < len(shape.layers)))


def _evaluate(spec: EvaluateSpec, tally: _Tally) -> None:
    """Models come one after the other, beside the reward model and the reference."""
    if spec.reward_model is not None:
        tally.freeze("rewardModel", spec.reward_model)
    one_by_one = []
    for ref in spec.models:
        alone = _Tally(tally.place, tally.shape_of)
        shape = alone.freeze(ref.label, ref)
        _evaluated(spec, alone, shape, alone.held(ref, trained=False))
        if spec.starts_server and ref.url is None:
            alone.serve(shape, spec.server)
            tally.keep(alone.server)
        tally.models += alone.models
        one_by_one.append(alone.memory)
    tally.add(largest(one_by_one))


def _evaluated(spec: EvaluateSpec, tally: _Tally, shape: ModelShape, held: int) -> None:
    split = spec.parallel.splits_frozen and tally.place.world > 1
    for entry in spec.benchmarks:
        data, settings = entry.settings.data or spec.data, entry.settings
        if isinstance(settings, SampledSpec) and data is not None:
            sampling = settings.sampling or spec.sampling
            many = sampling.batch_size * tally.place.world
            tally.generate(shape, held, sampling, many, data.max_prompt_length, split)
    row = min(shape.positions, spec.parallel.micro_batch_tokens)
    tally.score(shape, spec.parallel.micro_batch_tokens, row)
    tally.add(Memory(cache=head_bytes(Trained(shape, held=held, head=SCORES), spec.parallel.micro_batch_tokens, False)))


COUNTED: dict[type[PhaseSpec], Callable[[Any, _Tally], None]] = {
    SftSpec: _sft,
    RewardSpec: _reward,
    DpoSpec: _dpo,
    PpoSpec: _ppo,
    RolloutSpec: _rollout,
    DistillSpec: _distill,
    EvaluateSpec: _evaluate,
}
"""Phase types that hold models on devices; packaging does not."""


def phase_needs(spec: PhaseSpec, place: Place, shape_of: ShapeOf) -> Needs | None:
    """What one device needs for a phase, None for a type that needs none. Raises UnknownSize for a model of unknown size."""
    count = COUNTED.get(type(spec))
    if count is None:
        return None
    tally = _Tally(place, shape_of)
    count(spec, tally)
    return tally.needs()


def ways(place: Place) -> list[Place]:
    """In which a phase may sample of split models: with whole weights, or on GPUs with layers gathered for every token."""
    return [replace(place, by_layers=by_layers) for by_layers in ((False, True) if place.gpu else (False,))]


def least_needs(spec: PhaseSpec, place: Place, shape_of: ShapeOf) -> tuple[Needs, bool]:
    """In the way that takes least, and whether that gathers layers. Of a type that holds models."""
    found = [(phase_needs(spec, way, shape_of), way.by_layers) for way in ways(place)]
    return min(((needs, slow) for needs, slow in found if needs is not None), key=lambda one: one[0].memory.total)

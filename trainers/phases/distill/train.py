"""Distillation on stored teacher traces and on the student's own samples (GKD, Agarwal et al. 2024), reward-weighted.

The loss of a step is sum_i w_i sum_t D_it / sum_i w_i n_i, where D_it is the divergence of response i's token t, n_i its
number of tokens and w_i its weight. Both sums go over all micro-batches and processes, and n_i counts the tokens of
what is trained on: counting the loader's instead is wrong on-policy, where responses are made during the step. Samples
by other weights than the student's have a weight per token, v_it: sum_i w_i sum_t v_it D_it / sum_i w_i sum_t v_it.
"""

import math
from collections.abc import Callable, Mapping
from collections.abc import Sequence as List
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import nn

from trainers.contract import BadInput
from trainers.core.batch import Batch, Packing, Sequence
from trainers.core.chat import ChatFormat
from trainers.core.checkpoint import Checkpoints
from trainers.core.context import Outcome, PhaseContext
from trainers.core.encode import joined, prompt_messages
from trainers.core.examples import Encoding, Examples, Steps, no_steps, open_examples
from trainers.core.export import save_model
from trainers.core.flops import model_flops
from trainers.core.head_losses import Beside, LogitsFn
from trainers.core.importance import Importance, prefix_importance, sampler_logprobs
from trainers.core.memory import print_memory
from trainers.core.models import LoadedModel, length_limit, load_causal_lm, load_some_layers, speak_alike
from trainers.core.reward_models import load_reward_model
from trainers.core.rollouts import Prompt, Sample, check_room, short_prompts
from trainers.core.rollouts_ahead import RolloutsAhead
from trainers.core.rows import Row
from trainers.core.scoring import Scorer, check_scoring, hidden_states
from trainers.core.served.teacher import Teachers, served_teachers
from trainers.core.sharding import whole_shape
from trainers.core.step import Layout, Measures, accumulate, in_eval_mode
from trainers.core.token_scores import logprobs_of, score_tokens, token_mask
from trainers.core.top_k import FOLDER, NOWHERE, Place, shards_in, vocabulary_digest
from trainers.core.trainee import Trainee
from trainers.core.vocabulary import check_known, lowest, same_tokens
from trainers.fingerprints import source_files
from trainers.phases.distill.ahead import Ahead
from trainers.phases.distill.loss import jsd_and_kl, shared, top_k_divergence
from trainers.phases.distill.spec import DistillSpec
from trainers.phases.distill.streams import Streams
from trainers.phases.distill.weights import correlation, own_sample_weights, reward_weights
from trainers.spec import DataSource, RowPolicy, Teaching


@dataclass(frozen=True)
class Example:
    """A response to learn on, after its prompt."""

    sequence: Sequence
    reward: float
    weight: float = 1.0
    scores: Place = NOWHERE
    """Where the teacher's log-probabilities of the response are, if it is not in memory."""
    teacher: str = ""
    """Its name, if there are several."""
    importance: torch.Tensor | None = None
    """Weights of its tokens, if others sampled them than learn from them."""

    @property
    def num_tokens(self) -> int:
        """Of the response."""
        return self.sequence.num_scored

    @property
    def mass(self) -> float:
        """Sum of its tokens' weights."""
        return self.num_tokens if self.importance is None else float(self.importance.sum())

    @property
    def shortened(self) -> int:
        return self.sequence.shortened


def main(spec: DistillSpec, ctx: PhaseContext) -> Outcome:
    with ExitStack() as held:  # however it ends, nobody waits for what a server has been asked ahead
        return _distill(spec, ctx, held)


def _distill(spec: DistillSpec, ctx: PhaseContext, held: ExitStack) -> Outcome:
    # ---- set up
    teacher, student = _models(spec, ctx)
    served = _served(spec, ctx, student, held)
    reward_model = load_reward_model(ctx, spec.reward_model) if spec.reward_model else None
    streams = Streams(spec.on_policy_fraction)
    known = served.known if served is not None else teacher.num_known if teacher is not None else None
    traces, prompts, total_steps = _data(spec, ctx, known, student, streams)
    _check_streams(spec, ctx, streams, total_steps)
    packing = spec.packing and min(student.packs, teacher.packs if teacher is not None else student.packs)
    layout = Layout(_sequences, spec.parallel.micro_batch_tokens, packing)
    trainee = Trainee(ctx.workers, Scorer(student.model), spec.optim, total_steps, model_flops(student.model))

    def asked(step: int) -> List[Prompt]:
        return prompts.batch(streams.index(step)) if streams.on_policy(step) else []

    rollouts = RolloutsAhead(ctx, spec, student, asked, total_steps, reward_model)
    held.callback(rollouts.close)
    checkpoints = Checkpoints(ctx, spec.checkpoint, {"model": trainee}, rollouts)
    beside = [*(some.model for some in (teacher, reward_model) if some is not None), *rollouts.models]
    print_memory(ctx, [(trainee, student.model)], beside, None if packing else spec.max_length)
    compared = _comparison(spec, ctx, teacher, served)

    def ask(batch: List[Example]) -> None:
        """In the order of this process's passes."""
        assert served is not None
        for some in layout.plan(ctx.workers, list(batch), trainee.flops):
            served.ask((batch[i].teacher, batch[i].sequence) for i in some)

    ahead = Ahead(streams, traces, total_steps, None if served is None else ask)
    first = checkpoints.restore()
    ctx.meter.begin(first, total_steps, spec.document())

    # ---- loop
    for step in range(first, total_steps):
        on_policy, index = streams.on_policy(step), streams.index(step)
        with ctx.meter.part("rollout"):
            batch, mismatch = _own_batch(spec, ctx, trainee, packing, rollouts.samples(step), step)
        if not on_policy:
            batch = ahead.batch(step)
        elif served is not None:
            ask(batch)
        ahead.prepare(step + 1)
        weigh = own_sample_weights if on_policy else reward_weights
        weights = weigh(torch.tensor([e.reward for e in batch]), spec.weighting)
        of_teachers = {teacher.name: teacher.weight for teacher in spec.teachers}
        batch = [
            replace(e, weight=weight * of_teachers.get(e.teacher, 1.0))
            for e, weight in zip(batch, weights.values.tolist(), strict=True)
        ]

        sums = accumulate(ctx, trainee, layout, step, batch, partial(terms, trainee.module, compared, batch))
        parts = {name: sums.pop(f"{PART}{name}") for name in sorted({e.teacher for e in batch} - {""})}
        with ctx.meter.part("optimizer"):
            update = trainee.update(step)
        lengths = torch.tensor([e.num_tokens for e in batch])
        reward = sum(e.reward for e in batch) / len(batch)
        ctx.meter.log(
            step + 1,
            **sums,
            **mismatch,
            reward=reward,
            on_policy=float(on_policy),
            response_length=float(lengths.double().mean()),
            ess=weights.effective_size,
            ess_share=weights.effective_size / len(weights.values),
            weights_clipped=weights.clipped,
            weight_length_correlation=correlation(weights.values, lengths),
            **_of_teachers(served, parts),
            **update,
        )
        stream = "onPolicy" if on_policy else "offPolicy"
        checkpoints.state |= {f"{stream}KlLast": sums["kl"], f"{stream}RewardLast": reward}
        leading = prompts if spec.on_policy_fraction == 1 else traces
        epoch_ends = on_policy == (leading is prompts) and leading.ends_epoch(index)
        checkpoints.after_step(step + 1, total_steps, epoch_ends)

    # ---- finish
    save_model(ctx, student)
    sizes = {"parameters": student.num_parameters}
    if teacher is not None:
        sizes["teacherParameters"] = teacher.num_parameters
    return Outcome(checkpoints.state | sizes, traces.records() + prompts.records(), total_steps)


PART = "loss_of_"
"""Begin of the measures that are a teacher's part of the loss."""

Compared = Callable[[list[Example], Batch], tuple[LogitsFn, Beside | None]]
"""What a pass's student is compared by, and with: a teacher, or what one has said before."""


def terms(
    module: nn.Module, compared: Compared, batch: List[Example], some: list[Example], micro: Batch
) -> tuple[torch.Tensor, Measures]:
    """Some examples' part of a batch's loss, and of the divergence from the teacher."""
    compare, beside = compared(some, micro)
    total = sum(e.weight * e.mass for e in batch)
    shares = torch.tensor([e.weight / total for e in some], device=micro.segment.device)[micro.segment]
    of_tokens = [e.importance for e in some if e.importance is not None]
    if of_tokens:
        shares = shares * torch.cat(of_tokens).to(shares.device)
    loss, found = module(micro, compare, lambda values, at: (shares[at] * values).sum(), beside=beside)
    names = ("kl", "student_mass", "teacher_mass")[: found.shape[1] - 1]
    sums = found[:, 1:].sum(0) / sum(e.num_tokens for e in batch)
    return loss, dict(zip(names, sums, strict=True)) | _parts(batch, some, micro, shares * found[:, 0])


def _parts(batch: List[Example], some: list[Example], micro: Batch, of_tokens: torch.Tensor) -> Measures:
    """Each named teacher's part of a loss, of which ``of_tokens`` are the tokens', (K,)."""
    found: Measures = {}
    for name in sorted({e.teacher for e in batch} - {""}):
        whose = torch.tensor([e.teacher == name for e in some], dtype=torch.bool, device=of_tokens.device)
        found[f"{PART}{name}"] = of_tokens[whose[micro.segment]].sum()
    return found


def _of_teachers(served: Teachers | None, parts: Mapping[str, float]) -> dict[str, float]:
    """What a step says of served teachers."""
    return {} if served is None else {"teacher_wait": served.waited(), **served.shares_of_loss(parts)}


def divergence(beta: float, temperature: float) -> LogitsFn:
    """For a student's and its teacher's logits: the divergence to train on and KL(teacher || student), (k, 2).

    Where the two heads have different numbers of padding rows, both are cut to the shared ones, which renormalises them.
    """

    def fn(logits: torch.Tensor, _: slice, wanted: torch.Tensor) -> torch.Tensor:
        if logits.shape != wanted.shape:
            logits, wanted = shared(logits, wanted)
        return torch.stack(jsd_and_kl(logits, wanted, beta, temperature), dim=-1)

    return fn


def _comparison(spec: DistillSpec, ctx: PhaseContext, teacher: LoadedModel | None, served: Teachers | None) -> Compared:
    beta = spec.divergence_beta
    if served is not None:

        def with_served(some: list[Example], batch: Batch) -> tuple[LogitsFn, Beside | None]:
            scores = served.scores([(e.teacher, e.sequence) for e in some], batch.segment.device)
            return top_k_divergence(*scores, beta), None

        return with_served
    if teacher is None:
        shards = shards_in(_shard_folders(spec, ctx))

        def with_stored(some: list[Example], batch: Batch) -> tuple[LogitsFn, Beside | None]:
            stored = shards.scores([(e.scores, e.num_tokens) for e in some], batch.segment.device)
            return top_k_divergence(*stored, beta), None

        return with_stored
    whole, model = divergence(beta, spec.temperature), teacher.model

    def with_teacher(some: list[Example], batch: Batch) -> tuple[LogitsFn, Beside | None]:
        with torch.no_grad():
            return whole, Beside(model, hidden_states(model, batch)[batch.scored_at])

    return with_teacher


def _sequences(example: Example) -> list[Sequence]:
    return [example.sequence]


def _check_streams(spec: DistillSpec, ctx: PhaseContext, streams: Streams, total_steps: int) -> None:
    """Say which stream so few steps leave out. Raises BadInput for a gate on it, which no training could meet."""
    for name in streams.without_steps(total_steps):
        said = f"onPolicyFraction {spec.on_policy_fraction:g} of {total_steps} steps leaves none that is {name}"
        for gate in spec.gates:
            if gate.metric.startswith(name):
                raise BadInput(f"gates: {gate.metric} cannot have a value, {said}: raise maxSteps or epochs")
        if ctx.workers.is_main:
            print(said)


def _models(spec: DistillSpec, ctx: PhaseContext) -> tuple[LoadedModel | None, LoadedModel]:
    """Teacher, if it is needed, and student. Raises BadInput when the same token id means different things to them."""
    if spec.teacher is None or not spec.loads_teacher:
        student = load_causal_lm(ctx, spec.student, spec.lora)
        check_scoring(student, ctx.workers)
        return None, student
    teacher = load_causal_lm(ctx, spec.teacher, frozen=True)
    if spec.student.teacher_layers is not None:
        start = spec.teacher.model_copy(update={"dtype": spec.student.dtype})
        student = load_some_layers(ctx, start, spec.student.teacher_layers, spec.lora)
    else:
        student = load_causal_lm(ctx, spec.student, spec.lora)
    if student.tokenizer.chat_template is None and teacher.tokenizer.chat_template is not None:
        print("student: it has no chat template and gets the teacher's, with its end token")
        speak_alike(teacher, student)
    problem = same_tokens(teacher.tokenizer, student.tokenizer)
    if problem:
        raise BadInput(f"student: its tokenizer cannot serve the teacher's: {problem}")
    check_scoring(teacher, ctx.workers)
    check_scoring(student, ctx.workers)
    student.num_known = lowest(student.num_known, teacher.num_known)
    return teacher, student


def _served(spec: DistillSpec, ctx: PhaseContext, student: LoadedModel, held: ExitStack) -> Teachers | None:
    """The teachers that servers have. The student then says nothing that one of them does not know."""
    asked: dict[str, tuple[str, Teaching]] = {t.name: (f"teachers ({t.name})", t) for t in spec.teachers}
    if spec.teacher is not None and spec.teacher.url is not None:
        asked[""] = ("teacher", spec.teacher)
    if not asked:
        return None
    rows = int(whole_shape(student.model.get_output_embeddings().weight)[0])
    longest = length_limit(student, spec.max_length)
    served = served_teachers(ctx, asked, student.chat, rows, longest)
    held.callback(served.close)
    student.num_known = lowest(student.num_known, served.known)
    return served


def _data(
    spec: DistillSpec, ctx: PhaseContext, known: int | None, student: LoadedModel, streams: Streams
) -> tuple[Steps[Example], Steps[Prompt], int]:
    """Steps on traces and on prompts, and how many there are of both. What the fraction leaves out has none.

    ``known``: ids below this are what the teacher knows, if it is there to be asked.
    """
    traces, prompts = _traces(spec, ctx, student, known), _prompts(spec, ctx, student, known)
    leading = prompts if traces is None else traces
    assert leading is not None, "the spec asks for one of them"
    duration = spec.duration
    wanted = leading.steps(spec.batch_size, duration.epochs, duration.max_steps).total_steps
    total_steps = duration.max_steps or streams.total_steps(wanted)
    on_policy = sum(map(streams.on_policy, range(total_steps)))
    on_prompts = duration.max_steps if leading is prompts else on_policy
    on_traces = duration.max_steps and total_steps - on_policy
    return (
        no_steps() if traces is None else traces.steps(spec.batch_size, duration.epochs, on_traces),
        no_steps() if prompts is None else prompts.steps(spec.batch_size, duration.epochs, on_prompts),
        total_steps,
    )


def _traces(spec: DistillSpec, ctx: PhaseContext, student: LoadedModel, known: int | None) -> Examples[Example] | None:
    if spec.traces is None or spec.on_policy_fraction == 1:
        return None
    files = _trace_files(spec, ctx)
    longest = length_limit(student, spec.max_length)

    def check(examples: list[Example]) -> None:
        check_known((e.sequence.ids for e in examples), known, student.tokenizer, "traces", "teacher")

    # A teacher may say things that cannot be learned, such as its end token's text: no reason to stop.
    encode = partial(_examples, student.chat, longest, tuple(teacher.name for teacher in spec.teachers))
    if spec.reads_scores:
        vocabulary = (vocabulary_digest(student.tokenizer), student.num_known or 0)
        encode = partial(_scored_examples, _shard_folders(spec, ctx), *vocabulary, student.chat, longest)
    encoding = Encoding("traces", encode, Example, check, skips=True)
    policy = RowPolicy(min_rows=spec.traces.min_rows)
    return open_examples(ctx, (DataSource(files=files),), encoding, policy, "traces")


def _trace_files(spec: DistillSpec, ctx: PhaseContext) -> str:
    assert spec.traces is not None
    return spec.traces.files or str(ctx.artifact(spec.traces).resolve())


def _shard_folders(spec: DistillSpec, ctx: PhaseContext) -> tuple[str, ...]:
    """Where a teacher's log-probabilities lie beside traces."""
    files = source_files(_trace_files(spec, ctx), ctx.base_dir)
    return tuple(sorted({str(path.resolve().parent / FOLDER) for path in files}))


def _examples(chat: ChatFormat, max_length: int, teachers: tuple[str, ...], row: Row) -> list[Example]:
    if not math.isfinite(row["reward"]):
        raise BadInput(f"traces: the reward of {row['prompt'][:60]!r} is {row['reward']}")
    prompt, response = chat.taught(prompt_messages(row), row["teacher_response"], row.get("ended", True))
    sequence = joined(prompt, response, max_length) if response else None
    if sequence is None:
        return []
    return [Example(sequence, float(row["reward"]), teacher=_teacher_of(row, teachers))]


def _teacher_of(row: Row, teachers: List[str]) -> str:
    """Whom a row is learned from; nobody in particular where there is one. Raises BadInput for any other name, or none."""
    if not teachers:
        return ""
    name = row.get("teacher")
    if name is None:
        raise BadInput(f"the row has no teacher: it must name one of teachers ({', '.join(teachers)})")
    if name not in teachers:
        raise BadInput(f"the row's teacher is {name!r}, which is none of teachers ({', '.join(teachers)})")
    return str(name)


def _scored_examples(
    folders: tuple[str, ...], vocabulary: str, known: int, chat: ChatFormat, max_length: int, row: Row
) -> list[Example]:
    """The very tokens that the teacher scored. Raises BadInput if the student's format makes others of the prompt."""
    if not math.isfinite(row["reward"]):
        raise BadInput(f"traces: the reward of {row['prompt'][:60]!r} is {row['reward']}")
    prompt, response, place = shards_in(folders).read(row, vocabulary, known)
    if chat.prompt(prompt_messages(row)) != prompt:
        raise BadInput(
            "the student's chat template makes other tokens of the prompt: set chatTemplate to the teacher's"
        )
    if row.get("ended", True) and response[-1] not in chat.stop_ids:
        token = chat.tokenizer.convert_ids_to_tokens(response[-1])
        raise BadInput(f"the response ends with {token!r}, which does not end the student's: set endToken to it")
    sequence = joined(prompt, response, max_length)
    return [] if sequence is None else [Example(sequence, float(row["reward"]), scores=place)]


def _prompts(spec: DistillSpec, ctx: PhaseContext, student: LoadedModel, known: int | None) -> Examples[Prompt] | None:
    if spec.prompts is None or spec.on_policy_fraction == 0:
        return None
    # A sample that did not fit maxLength would be trained behind another prompt than it was sampled from.
    longest = min(spec.prompts.max_prompt_length, spec.max_length - spec.sampling.max_new_tokens)
    data = spec.prompts.model_copy(update={"max_prompt_length": longest})
    teachers = tuple(teacher.name for teacher in spec.teachers)

    def check(prompts: list[Prompt]) -> None:
        check_room(student, prompts, spec.sampling)
        check_known((p.ids for p in prompts), known, student.tokenizer, "prompts", "teacher")

    encoding = Encoding("prompt", partial(_taught_prompts, teachers, student.chat, longest), Prompt, check)
    return open_examples(ctx, data.prompts, encoding, data, "prompts.prompts")


def _taught_prompts(teachers: tuple[str, ...], chat: ChatFormat, longest: int, row: Row) -> list[Prompt]:
    _teacher_of(row, teachers)
    return short_prompts(chat, longest, row)


def _own_batch(
    spec: DistillSpec, ctx: PhaseContext, student: Trainee, packing: bool | Packing, samples: List[Sample], step: int
) -> tuple[list[Example], dict[str, float]]:
    """The student's responses, behind their prompts, and how far it is from what sampled them.

    None of them is shortened: together they fit (:func:`_prompts`).
    """
    teachers = [teacher.name for teacher in spec.teachers]
    found = [(joined(s.prompt.ids, s.ids, spec.max_length), s) for s in samples]
    batch = [
        Example(sequence, s.reward, teacher=_teacher_of(s.prompt.row, teachers))
        for sequence, s in found
        if sequence is not None
    ]
    if not batch or not spec.corrects:
        return batch, {}
    importance = _importance(spec, ctx, student, samples, batch, packing)
    measures = importance.measures | {"staleness": min(step, spec.staleness)}
    return _weighed(batch, importance.weights), measures


def _importance(
    spec: DistillSpec,
    ctx: PhaseContext,
    student: Trainee,
    samples: List[Sample],
    batch: List[Example],
    packing: bool | Packing,
) -> Importance:
    """What a batch's tokens weigh: a divergence is a function of the tokens before, as the student says them over the sampler."""
    sequences = [example.sequence for example in batch]
    layout = Layout[Sequence](lambda sequence: [sequence], spec.parallel.micro_batch_tokens, packing)
    with in_eval_mode(student.module):
        scores = logprobs_of(student.module, spec.sampling.temperature or 1.0)
        (policy,) = score_tokens(ctx.workers, layout, sequences, [scores])
    mask = token_mask(sequences)
    return prefix_importance(policy, sampler_logprobs(samples, mask.shape[1]), mask, spec.importance_cap)


def _weighed(batch: list[Example], weights: torch.Tensor | None) -> list[Example]:
    if weights is None:
        return batch
    return [replace(e, importance=row[: e.num_tokens]) for e, row in zip(batch, weights, strict=True)]

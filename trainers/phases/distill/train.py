"""Distillation on stored teacher traces and on the student's own samples (GKD, Agarwal et al. 2024), reward-weighted.

The loss of a step is sum_i w_i sum_t D_it / sum_i w_i n_i, where D_it is the divergence of response i's token t, n_i its
number of tokens and w_i its weight. Both sums go over all micro-batches and processes, and n_i counts the tokens of
what is trained on: counting the loader's instead is wrong on-policy, where responses are made during the step. Samples
by other weights than the student's have a weight per token, v_it: sum_i w_i sum_t v_it D_it / sum_i w_i sum_t v_it.
"""

from collections.abc import Callable, Mapping
from collections.abc import Sequence as List
from contextlib import ExitStack
from dataclasses import replace
from functools import partial

import torch
from torch import nn

from trainers.contract import BadInput
from trainers.core.batch import Batch, Sequence
from trainers.core.checkpoint import Checkpoints
from trainers.core.context import Outcome, PhaseContext
from trainers.core.export import save_model
from trainers.core.flops import model_flops
from trainers.core.head_losses import Beside, LogitsFn
from trainers.core.memory import print_memory
from trainers.core.models import LoadedModel, length_limit, load_causal_lm, load_some_layers, speak_alike
from trainers.core.reward_models import load_reward_model
from trainers.core.rollouts import Prompt
from trainers.core.rollouts_ahead import RolloutsAhead
from trainers.core.scoring import Scorer, check_scoring, hidden_states
from trainers.core.served.teacher import Teachers, served_teachers
from trainers.core.sharding import whole_shape
from trainers.core.step import Layout, Measures, accumulate
from trainers.core.top_k import shards_in
from trainers.core.trainee import Trainee
from trainers.core.vocabulary import lowest, same_tokens
from trainers.phases.distill.ahead import Ahead
from trainers.phases.distill.data import Example, open_streams, shard_folders
from trainers.phases.distill.loss import jsd_and_kl, shared, top_k_divergence
from trainers.phases.distill.own_samples import own_batch
from trainers.phases.distill.spec import DistillSpec
from trainers.phases.distill.streams import Streams
from trainers.phases.distill.weights import correlation, own_sample_weights, reward_weights
from trainers.spec import Teaching


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
    traces, prompts, total_steps = open_streams(spec, ctx, known, student, streams)
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
    if served is not None and first < total_steps:
        of_prompts = [prompt.ids for prompt in asked(first)]
        rows = of_prompts or [e.sequence.ids.tolist() for e in traces.batch(streams.index(first))]
        served.check_rows(student.tokenizer, rows[:CHECKED_ROWS])
    rollouts.start(first)
    ctx.meter.begin(first, total_steps, spec.document())

    # ---- loop
    for step in range(first, total_steps):
        on_policy, index = streams.on_policy(step), streams.index(step)
        with ctx.meter.part("rollout"):
            batch, mismatch = own_batch(spec, ctx, trainee, packing, rollouts.samples(step), step)
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


CHECKED_ROWS = 4
"""Of the first step's, whose text a served teacher is asked to make tokens of."""

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
        shards = shards_in(shard_folders(spec, ctx))

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

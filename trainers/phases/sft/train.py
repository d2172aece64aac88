"""Supervised fine-tuning.

The loss is -mean log q(y_t) over the scored tokens of the whole optimizer step, all micro-batches and processes
together; averaging micro-batch means instead would weigh short responses more.
"""

from functools import partial

import torch

from trainers.core.batch import BatchOrder, Sequence, collate, plan_micro_batches
from trainers.core.checkpoint import Checkpoints
from trainers.core.context import Outcome, PhaseContext
from trainers.core.encode import sft_sequences
from trainers.core.export import save_model
from trainers.core.flops import model_flops
from trainers.core.models import LoadedModel, load_causal_lm
from trainers.core.rows import Rows, encode_rows, read_rows
from trainers.core.scoring import Scorer, check_scoring, target_logprobs
from trainers.core.trainee import Trainee, seed_step
from trainers.phases.sft.spec import SftSpec


def main(spec: SftSpec, ctx: PhaseContext) -> Outcome:
    # ---- set up
    loaded = load_causal_lm(ctx, spec.model, spec.lora)
    check_scoring(loaded, ctx.workers)
    rows, train = _sequences(spec, ctx, loaded, "train")
    held_out_rows, held_out = _sequences(spec, ctx, loaded, "eval") if spec.data.eval else (Rows(), [])
    order = BatchOrder(len(train), spec.batch_size, spec.duration.epochs, spec.duration.max_steps, ctx.seed)
    trainee = Trainee(ctx.workers, Scorer(loaded.model), spec.optim, order.total_steps)
    checkpoints = Checkpoints(ctx, spec.checkpoint, {"model": trainee})
    first = checkpoints.restore()
    flops = model_flops(loaded.model)
    ctx.meter.begin(first, order.total_steps, spec.document())

    # ---- loop
    for step in range(first, order.total_steps):
        with ctx.meter.part("data"):
            batch = [train[i] for i in order.indices(step)]
            micro_batches = plan_micro_batches(
                [[len(s)] for s in batch], spec.parallel.micro_batch_tokens, spec.data.packing, ctx.workers.world
            )[ctx.workers.rank]
            num_scored = sum(s.num_scored for s in batch)
        seed_step(ctx.seed, step, ctx.workers.rank)
        loss_sum = torch.zeros((), device=ctx.workers.device)
        for i, chosen in enumerate(micro_batches):
            with ctx.meter.part("forward_backward"):
                sequences = [batch[j] for j in chosen]
                micro = collate(sequences, spec.data.packing, ctx.workers.device)
                loss = -trainee.module(micro, target_logprobs(micro)).sum() / num_scored
                trainee.backward(loss, last=i == len(micro_batches) - 1)
                loss_sum += loss.detach()
                cost = flops.training(map(len, sequences), sum(s.num_scored for s in sequences))
                ctx.meter.count(sum(map(len, sequences)), len(sequences), cost)
        with ctx.meter.part("optimizer"):
            update = trainee.update(step)
        ctx.meter.log(step + 1, loss=ctx.workers.sum(loss_sum).item(), **update)
        if held_out and spec.evaluation.every_steps and (step + 1) % spec.evaluation.every_steps == 0:
            _evaluate(spec, ctx, trainee, held_out, checkpoints, step + 1)
        checkpoints.after_step(step + 1, order.total_steps, (step + 1) % order.steps_per_epoch == 0)

    # ---- finish
    metrics = {}
    if held_out:
        metrics["evalLoss"] = _evaluate(spec, ctx, trainee, held_out, checkpoints, order.total_steps)
    if held_out and spec.evaluation.keep_best:
        checkpoints.load_best("model")
        metrics["evalLoss"] = checkpoints.state["best"]
    metrics["parameters"] = loaded.num_parameters
    if ctx.workers.is_main:
        ctx.meter.stage("saving")
        save_model(loaded, ctx.dir.model)
    return Outcome(metrics, rows.records + held_out_rows.records, order.total_steps)


def _sequences(spec: SftSpec, ctx: PhaseContext, loaded: LoadedModel, part: str) -> tuple[Rows, list[Sequence]]:
    where = f"data.{part}"
    rows = read_rows(getattr(spec.data, part), "sft", ctx.base_dir, spec.data.on_malformed, where)
    encode = partial(_encode, spec, loaded)
    return rows, encode_rows(rows, encode, where)


def _encode(spec: SftSpec, loaded: LoadedModel, row: dict[str, object]) -> list[Sequence]:
    return sft_sequences(loaded.chat, row, spec.data.max_length, spec.loss_on == "everything")


@torch.no_grad()
def _evaluate(
    spec: SftSpec, ctx: PhaseContext, trainee: Trainee, held_out: list[Sequence], checkpoints: Checkpoints, step: int
) -> float:
    """Loss per scored token on held-out rows; keeps the weights if they are the best so far."""
    with ctx.meter.part("evaluation"):
        module = trainee.module.eval()
        plan = plan_micro_batches(
            [[len(s)] for s in held_out], spec.parallel.micro_batch_tokens, spec.data.packing, ctx.workers.world
        )[ctx.workers.rank]
        total = torch.zeros((), device=ctx.workers.device)
        for chosen in plan:
            micro = collate([held_out[j] for j in chosen], spec.data.packing, ctx.workers.device)
            total -= module(micro, target_logprobs(micro)).sum()
        module.train()
        loss = ctx.workers.sum(total).item() / sum(s.num_scored for s in held_out)
    ctx.meter.record(step, eval_loss=loss)
    if spec.evaluation.keep_best:
        checkpoints.keep_best("model", loss, higher_is_better=False)
    return loss

"""Direct preference optimization (Rafailov et al. 2023) and its relatives.

The loss of an optimizer step is the mean over all its pairs, plus `nllWeight` times the mean negative log-likelihood
of all its chosen tokens. Both are divided by counts of the whole step, so micro-batches and processes do not change it.
"""

import torch

from trainers.core.batch import Batch, BatchOrder, collate, plan_micro_batches
from trainers.core.checkpoint import Checkpoints
from trainers.core.context import Outcome, PhaseContext
from trainers.core.encode import Pair, preference_pairs
from trainers.core.export import save_model
from trainers.core.flops import model_flops
from trainers.core.models import LoadedModel, load_causal_lm
from trainers.core.rows import Rows, encode_rows, read_rows
from trainers.core.scoring import Scorer, check_scoring, target_logprobs
from trainers.core.trainee import Trainee, seed_step
from trainers.phases.dpo.loss import dpo_loss
from trainers.phases.dpo.reference import Reference, reference_for
from trainers.phases.dpo.spec import DpoSpec

MEASURES = ("loss", "accuracy", "reward", "rewards/chosen", "rewards/rejected", "logps/chosen", "logps/rejected")
"""Means over pairs. Implicit rewards are beta * log-ratio, summed over a response; `reward` is their margin."""


def main(spec: DpoSpec, ctx: PhaseContext) -> Outcome:
    # ---- set up
    loaded = load_causal_lm(ctx, spec.policy, spec.lora)
    check_scoring(loaded, ctx.workers)
    rows, train = _pairs(spec, ctx, loaded, "train")
    held_out_rows, held_out = _pairs(spec, ctx, loaded, "eval") if spec.data.eval else (Rows(), [])
    order = BatchOrder(len(train), spec.batch_size, spec.duration.epochs, spec.duration.max_steps, ctx.seed)
    scored = {"train": [train[i] for i in order.used()], "eval": held_out}
    reference = reference_for(spec, ctx, loaded, {name: pairs for name, pairs in scored.items() if pairs})
    trainee = Trainee(ctx.workers, Scorer(loaded.model), spec.optim, order.total_steps)
    checkpoints = Checkpoints(ctx, spec.checkpoint, {"model": trainee})
    first = checkpoints.restore()
    flops = model_flops(loaded.model)
    ctx.meter.begin(first, order.total_steps, spec.document())

    # ---- loop
    for step in range(first, order.total_steps):
        with ctx.meter.part("data"):
            batch = [train[i] for i in order.indices(step)]
            micro_batches = _plan(spec, ctx, batch)
            num_tokens = sum(pair.chosen.num_scored for pair in batch)
        seed_step(ctx.seed, step, ctx.workers.rank)
        sums = torch.zeros(len(MEASURES) + 2, device=ctx.workers.device)
        for i, chosen in enumerate(micro_batches):
            with ctx.meter.part("forward_backward"):
                pairs = [batch[j] for j in chosen]
                micro = _collate(spec, ctx, pairs)
                expected = reference(pairs, micro)
                logprobs = micro.sums(trainee.module(micro, target_logprobs(micro)))
                logprobs = logprobs[: 2 * len(pairs)].view(-1, 2)
                losses, measures = _losses(spec, pairs, logprobs, expected)
                loss = losses.sum() / len(batch)
                if spec.nll_weight:
                    loss = loss - spec.nll_weight * logprobs[:, 0].sum() / num_tokens
                trainee.backward(loss, last=i == len(micro_batches) - 1)
                sums += measures
                lengths = [length for pair in pairs for length in pair.lengths]
                num_scored = sum(pair.chosen.num_scored + pair.rejected.num_scored for pair in pairs)
                ctx.meter.count(sum(lengths), len(pairs), flops.training(lengths, num_scored))
        with ctx.meter.part("optimizer"):
            update = trainee.update(step)
        ctx.meter.log(step + 1, **_means(spec, ctx.workers.sum(sums), len(batch), num_tokens), **update)
        if held_out and _is_due(spec, step + 1, order.total_steps):
            _evaluate(spec, ctx, trainee, held_out, reference, checkpoints, step + 1)
        checkpoints.after_step(step + 1, order.total_steps, (step + 1) % order.steps_per_epoch == 0)

    # ---- finish
    metrics: dict[str, float] = {}
    if held_out:
        metrics = _evaluate(spec, ctx, trainee, held_out, reference, checkpoints, order.total_steps)
    if held_out and spec.evaluation.keep_best:
        checkpoints.load_best("model")
        metrics = _held_out_metrics(spec, ctx, trainee, held_out, reference)
    metrics["parameters"] = loaded.num_parameters
    if ctx.workers.is_main:
        ctx.meter.stage("saving")
        save_model(loaded, ctx.dir.model)
    return Outcome(metrics, rows.records + held_out_rows.records, order.total_steps)


def _pairs(spec: DpoSpec, ctx: PhaseContext, loaded: LoadedModel, part: str) -> tuple[Rows, list[Pair]]:
    where = f"data.{part}"
    rows = read_rows(getattr(spec.data, part), "preference", ctx.base_dir, spec.data.on_malformed, where)
    return rows, encode_rows(rows, lambda row: preference_pairs(loaded.chat, row, spec.data.max_length), where)


def _plan(spec: DpoSpec, ctx: PhaseContext, pairs: list[Pair]) -> list[list[int]]:
    """This process's micro-batches, as indices of pairs."""
    return plan_micro_batches(
        [pair.lengths for pair in pairs], spec.parallel.micro_batch_tokens, spec.data.packing, ctx.workers.world
    )[ctx.workers.rank]


def _collate(spec: DpoSpec, ctx: PhaseContext, pairs: list[Pair]) -> Batch:
    """Chosen, rejected, chosen, …"""
    sequences = [sequence for pair in pairs for sequence in (pair.chosen, pair.rejected)]
    return collate(sequences, spec.data.packing, ctx.workers.device)


def _losses(
    spec: DpoSpec, pairs: list[Pair], logprobs: torch.Tensor, expected: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Each pair's loss (P,), and sums over pairs of :data:`MEASURES`, of log-ratios and of response tokens."""
    counts = [[pair.chosen.num_scored, pair.rejected.num_scored] for pair in pairs]
    lengths = torch.tensor(counts, device=logprobs.device).view(-1, 2)
    ratios = logprobs - expected
    chosen, rejected = ratios.unbind(1)
    losses = dpo_loss(chosen, rejected, lengths, spec.loss, spec.beta, spec.label_smoothing, spec.length_normalize)
    rewards = spec.beta * ratios.detach()
    margin = rewards[:, 0] - rewards[:, 1]
    won = torch.heaviside(margin, margin.new_tensor(0.5))  # a tie is half right, as a coin would be
    rows = [losses.detach(), won, margin, *rewards.unbind(1), *logprobs.detach().unbind(1)]
    return losses, torch.stack([*(row.sum() for row in rows), ratios.detach().sum(), lengths.sum()])


def _means(spec: DpoSpec, sums: torch.Tensor, num_pairs: int, num_tokens: int) -> dict[str, float]:
    """The step's metrics. `log_ratio` is the mean of log(policy / reference) over all response tokens.

    It is no KL divergence: the pairs' responses come from neither of the two.
    """
    *totals, log_ratios, all_tokens = sums.tolist()
    means = {name: total / num_pairs for name, total in zip(MEASURES, totals, strict=True)}
    if spec.nll_weight:
        means["nll"] = -totals[MEASURES.index("logps/chosen")] / num_tokens
        means["loss"] += spec.nll_weight * means["nll"]
    return means | {"log_ratio": log_ratios / all_tokens}


def _is_due(spec: DpoSpec, step: int, total_steps: int) -> bool:
    every = spec.evaluation.every_steps
    return every is not None and step % every == 0 and step < total_steps


def _evaluate(
    spec: DpoSpec,
    ctx: PhaseContext,
    trainee: Trainee,
    held_out: list[Pair],
    reference: Reference,
    checkpoints: Checkpoints,
    step: int,
) -> dict[str, float]:
    """Metrics on held-out pairs; keeps the weights if they are the best so far."""
    with ctx.meter.part("evaluation"):
        metrics = _held_out_metrics(spec, ctx, trainee, held_out, reference)
    ctx.meter.record(step, eval_loss=metrics["evalLoss"], eval_accuracy=metrics["evalAccuracy"])
    if spec.evaluation.keep_best:
        checkpoints.keep_best("model", metrics["evalLoss"], higher_is_better=False)
    return metrics


@torch.no_grad()
def _held_out_metrics(
    spec: DpoSpec, ctx: PhaseContext, trainee: Trainee, held_out: list[Pair], reference: Reference
) -> dict[str, float]:
    """Final metrics, the same on all processes. `evalLoss` is the preference loss alone, without the NLL term."""
    module = trainee.module.eval()
    sums = torch.zeros(len(MEASURES) + 2, device=ctx.workers.device)
    for chosen in _plan(spec, ctx, held_out):
        pairs = [held_out[j] for j in chosen]
        micro = _collate(spec, ctx, pairs)
        logprobs = micro.sums(module(micro, target_logprobs(micro)))[: 2 * len(pairs)].view(-1, 2)
        sums += _losses(spec, pairs, logprobs, reference(pairs, micro))[1]
    module.train()
    loss, accuracy, margin = (ctx.workers.sum(sums)[:3] / len(held_out)).tolist()
    return {"evalLoss": loss, "evalAccuracy": accuracy, "evalMargin": margin}

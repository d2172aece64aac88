"""Direct preference optimization (Rafailov et al. 2023) and its relatives.

The loss of an optimizer step is the mean over all its pairs, plus `nllWeight` times the mean negative log-likelihood
of all its chosen tokens. Both are divided by counts of the whole step, so micro-batches and processes do not change it.
"""

from functools import partial

import torch

from trainers.core.batch import Batch
from trainers.core.checkpoint import Checkpoints
from trainers.core.context import Outcome, PhaseContext
from trainers.core.dropout import take_out_dropout
from trainers.core.encode import Pair, preference_pairs
from trainers.core.examples import Encoding, Examples, open_examples
from trainers.core.export import save_model
from trainers.core.flops import model_flops
from trainers.core.head_losses import LossFn
from trainers.core.memory import print_memory
from trainers.core.models import LoadedModel, length_limit, load_causal_lm
from trainers.core.scoring import Scorer, check_scoring, target_logprobs
from trainers.core.step import Layout, Measures, accumulate, measured
from trainers.core.trainee import Trainee
from trainers.phases.dpo.loss import dpo_loss
from trainers.phases.dpo.reference import Batches, PairScores, pair_logprobs, pair_sizes, pair_sums, reference_for
from trainers.phases.dpo.spec import DpoSpec


def main(spec: DpoSpec, ctx: PhaseContext) -> Outcome:
    # ---- set up
    loaded = load_causal_lm(ctx, spec.policy, spec.lora)
    check_scoring(loaded, ctx.workers)
    take_out_dropout(loaded.model)
    train = _pairs(spec, ctx, loaded, "train").steps(spec.batch_size, spec.duration.epochs, spec.duration.max_steps)
    eval_data = _pairs(spec, ctx, loaded, "eval") if spec.data.eval else None
    held_out = eval_data.everything() if eval_data else []
    layout = Layout[Pair](
        lambda pair: pair.sequences, spec.parallel.micro_batch_tokens, spec.data.packing and loaded.packs
    )
    wanted: Batches = {"train": lambda: map(train.batch, train.steps_of_first_pass)}
    wanted |= {"eval": lambda: iter([held_out])} if held_out else {}
    reference, beside = reference_for(spec, ctx, loaded, layout, wanted)
    trainee = Trainee(ctx.workers, Scorer(loaded.model), spec.optim, train.total_steps, model_flops(loaded.model))
    checkpoints = Checkpoints(ctx, spec.checkpoint, {"model": trainee})
    row = None if layout.packing else spec.data.max_length
    print_memory(ctx, [(trainee, loaded.model)], beside, row)
    first = checkpoints.restore()
    ctx.meter.begin(first, train.total_steps, spec.document())

    # ---- loop
    for step in range(first, train.total_steps):
        batch = train.batch(step)

        def terms(pairs: list[Pair], micro: Batch, batch: list[Pair] = batch) -> tuple[torch.Tensor, Measures]:
            theirs = reference(pairs, micro)
            loss_fn = _loss_fn(spec, pairs, theirs, batch)
            loss, tokens = trainee.module(micro, target_logprobs(micro), loss_fn, pair_sizes(pairs))
            logprobs = pair_sums(pairs, tokens)
            measures = _means(spec, logprobs, logprobs - theirs, batch)
            if spec.nll_weight:
                measures["nll"] = -logprobs[:, 0].sum() / _chosen_tokens(batch)
            return loss, measures

        sums = accumulate(ctx, trainee, layout, step, batch, terms)
        with ctx.meter.part("optimizer"):
            update = trainee.update(step)
        ctx.meter.log(step + 1, **sums, **update)
        if held_out and spec.evaluation.is_due(step + 1, train.total_steps):
            _evaluate(spec, ctx, trainee, layout, held_out, reference, checkpoints, step + 1)
        checkpoints.after_step(step + 1, train.total_steps, train.ends_epoch(step))

    # ---- finish
    metrics: dict[str, float] = {}
    if held_out:
        metrics = _evaluate(spec, ctx, trainee, layout, held_out, reference, checkpoints, train.total_steps)
    if held_out and spec.evaluation.keep_best:
        checkpoints.load_best("model")
        metrics = _held_out_metrics(spec, ctx, trainee, layout, held_out, reference)
    metrics["parameters"] = loaded.num_parameters
    save_model(ctx, loaded)
    return Outcome(metrics, train.records() + (eval_data.all_records() if eval_data else []), train.total_steps)


def _pairs(spec: DpoSpec, ctx: PhaseContext, loaded: LoadedModel, part: str) -> Examples[Pair]:
    encode = partial(preference_pairs, loaded.chat, max_length=length_limit(loaded, spec.data.max_length))
    encoding = Encoding(spec.row_schemas()["data"], encode, Pair)
    return open_examples(ctx, getattr(spec.data, part), encoding, spec.data, f"data.{part}")


def _loss_fn(spec: DpoSpec, pairs: list[Pair], reference: torch.Tensor, batch: list[Pair]) -> LossFn:
    """The step's loss as a sum over these pairs, from the log-probabilities of their tokens."""

    def loss(tokens: torch.Tensor, items: slice) -> torch.Tensor:
        logprobs = pair_sums(pairs[items], tokens)
        found = _losses(spec, pairs[items], logprobs - reference[items]).sum() / len(batch)
        if spec.nll_weight:
            found = found - spec.nll_weight * logprobs[:, 0].sum() / _chosen_tokens(batch)
        return found

    return loss


def _chosen_tokens(batch: list[Pair]) -> int:
    return sum(pair.chosen.num_scored for pair in batch)


def _losses(spec: DpoSpec, pairs: list[Pair], ratios: torch.Tensor) -> torch.Tensor:
    """Each pair's loss from its log-ratios (P, 2): (P,)."""
    counts = [[pair.chosen.num_scored, pair.rejected.num_scored] for pair in pairs]
    lengths = torch.tensor(counts, device=ratios.device).view(-1, 2)
    chosen, rejected = ratios.unbind(1)
    return dpo_loss(chosen, rejected, lengths, spec.loss, spec.beta, spec.label_smoothing, spec.length_normalize)


def _means(spec: DpoSpec, logprobs: torch.Tensor, ratios: torch.Tensor, batch: list[Pair]) -> Measures:
    """Some pairs' part of the means over a whole batch, from log-probabilities and log-ratios, (P, 2) each.

    Implicit rewards are beta * log-ratio, summed over a response; `reward` is their margin. `log_ratio` is the mean of
    log(policy / reference) over all response tokens. It is no KL divergence: the responses come from neither of the two.
    """
    margin = spec.beta * (ratios[:, 0] - ratios[:, 1])
    over_pairs = {
        "accuracy": torch.heaviside(margin, margin.new_tensor(0.5)),  # a tie is half right, as a coin would be
        "reward": margin,
        "rewards/chosen": spec.beta * ratios[:, 0],
        "rewards/rejected": spec.beta * ratios[:, 1],
        "logps/chosen": logprobs[:, 0],
        "logps/rejected": logprobs[:, 1],
    }
    num_tokens = sum(sequence.num_scored for pair in batch for sequence in pair.sequences)
    means = {name: values.sum() / len(batch) for name, values in over_pairs.items()}
    return means | {"log_ratio": ratios.sum() / num_tokens}


def _evaluate(
    spec: DpoSpec,
    ctx: PhaseContext,
    trainee: Trainee,
    layout: Layout[Pair],
    held_out: list[Pair],
    reference: PairScores,
    checkpoints: Checkpoints,
    step: int,
) -> dict[str, float]:
    """Metrics on held-out pairs; keeps the weights if they are the best so far."""
    with ctx.meter.part("evaluation"):
        metrics = _held_out_metrics(spec, ctx, trainee, layout, held_out, reference)
    ctx.meter.record(step, eval_loss=metrics["evalLoss"], eval_accuracy=metrics["evalAccuracy"])
    if spec.evaluation.keep_best:
        checkpoints.keep_best("model", metrics["evalLoss"], higher_is_better=False)
    return metrics


def _held_out_metrics(
    spec: DpoSpec,
    ctx: PhaseContext,
    trainee: Trainee,
    layout: Layout[Pair],
    held_out: list[Pair],
    reference: PairScores,
) -> dict[str, float]:
    """Final metrics, the same on all processes. `evalLoss` is the preference loss alone, without the NLL term."""

    def measure(pairs: list[Pair], micro: Batch) -> Measures:
        logprobs = pair_logprobs(trainee.module, pairs, micro)
        ratios = logprobs - reference(pairs, micro)
        loss = _losses(spec, pairs, ratios).sum() / len(held_out)
        return {"loss": loss, **_means(spec, logprobs, ratios, held_out)}

    means = measured(ctx, trainee.module, layout, held_out, measure)
    return {"evalLoss": means["loss"], "evalAccuracy": means["accuracy"], "evalMargin": means["reward"]}

"""Supervised fine-tuning.

The loss is -mean log q(y_t) over the scored tokens of the whole optimizer step, all micro-batches and processes
together; averaging micro-batch means instead would weigh short responses more.
"""

from functools import partial

import torch

from trainers.core.batch import Batch, Sequence
from trainers.core.checkpoint import Checkpoints
from trainers.core.context import Outcome, PhaseContext
from trainers.core.encode import sft_sequences
from trainers.core.examples import Encoding, Examples, open_examples
from trainers.core.export import save_model
from trainers.core.flops import model_flops
from trainers.core.memory import print_memory
from trainers.core.models import LoadedModel, length_limit, load_causal_lm
from trainers.core.scoring import Scorer, check_scoring, target_logprobs
from trainers.core.step import Layout, Measures, accumulate, measured
from trainers.core.trainee import Trainee
from trainers.phases.sft.spec import SftSpec


def main(spec: SftSpec, ctx: PhaseContext) -> Outcome:
    # ---- set up
    loaded = load_causal_lm(ctx, spec.model, spec.lora)
    check_scoring(loaded, ctx.workers)
    train = _sequences(spec, ctx, loaded, "train").steps(spec.batch_size, spec.duration.epochs, spec.duration.max_steps)
    eval_data = _sequences(spec, ctx, loaded, "eval") if spec.data.eval else None
    held_out = eval_data.everything() if eval_data else []
    layout = Layout(_alone, spec.parallel.micro_batch_tokens, spec.data.packing and loaded.packs)
    trainee = Trainee(ctx.workers, Scorer(loaded.model), spec.optim, train.total_steps, model_flops(loaded.model))
    checkpoints = Checkpoints(ctx, spec.checkpoint, {"model": trainee})
    row = None if layout.packing else spec.data.max_length
    print_memory(ctx, [(trainee, loaded.model)], row=row)
    first = checkpoints.restore()
    ctx.meter.begin(first, train.total_steps, spec.document())

    # ---- loop
    for step in range(first, train.total_steps):
        batch = train.batch(step)
        num_scored = sum(sequence.num_scored for sequence in batch)

        def terms(_: list[Sequence], micro: Batch, num_scored: int = num_scored) -> tuple[torch.Tensor, Measures]:
            loss, _ = trainee.module(micro, target_logprobs(micro), lambda logprobs, _: -logprobs.sum() / num_scored)
            return loss, {}

        sums = accumulate(ctx, trainee, layout, step, batch, terms)
        with ctx.meter.part("optimizer"):
            update = trainee.update(step)
        ctx.meter.log(step + 1, **sums, **update)
        if held_out and spec.evaluation.is_due(step + 1, train.total_steps):
            _evaluate(spec, ctx, trainee, layout, held_out, checkpoints, step + 1)
        checkpoints.after_step(step + 1, train.total_steps, train.ends_epoch(step))

    # ---- finish
    metrics = {}
    if held_out:
        metrics["evalLoss"] = _evaluate(spec, ctx, trainee, layout, held_out, checkpoints, train.total_steps)
    if held_out and spec.evaluation.keep_best:
        checkpoints.load_best("model")
        metrics["evalLoss"] = checkpoints.state["best"]
    metrics["parameters"] = loaded.num_parameters
    save_model(ctx, loaded)
    return Outcome(metrics, train.records() + (eval_data.all_records() if eval_data else []), train.total_steps)


def _sequences(spec: SftSpec, ctx: PhaseContext, loaded: LoadedModel, part: str) -> Examples[Sequence]:
    encode = partial(
        sft_sequences,
        loaded.chat,
        max_length=length_limit(loaded, spec.data.max_length),
        everything=spec.loss_on == "everything",
    )
    encoding = Encoding(spec.row_schemas()["data"], encode, Sequence)
    return open_examples(ctx, getattr(spec.data, part), encoding, spec.data, f"data.{part}")


def _alone(sequence: Sequence) -> list[Sequence]:
    return [sequence]


def _evaluate(
    spec: SftSpec,
    ctx: PhaseContext,
    trainee: Trainee,
    layout: Layout[Sequence],
    held_out: list[Sequence],
    checkpoints: Checkpoints,
    step: int,
) -> float:
    """Loss per scored token on held-out rows; keeps the weights if they are the best so far."""

    def measure(_: list[Sequence], micro: Batch) -> Measures:
        return {"loss": -trainee.module(micro, target_logprobs(micro)).sum()}

    with ctx.meter.part("evaluation"):
        total = measured(ctx, trainee.module, layout, held_out, measure)["loss"]
    loss = total / sum(sequence.num_scored for sequence in held_out)
    ctx.meter.record(step, eval_loss=loss)
    if spec.evaluation.keep_best:
        checkpoints.keep_best("model", loss, higher_is_better=False)
    return loss

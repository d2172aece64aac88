"""Reward modelling (Bradley and Terry 1952; Ouyang et al. 2022).

The loss of an optimizer step is the mean over all its pairs, plus `lmWeight` times the mean over all scored tokens of
its chosen responses. Both are divided by counts of the whole step, so micro-batches and processes do not change it.
"""

from dataclasses import replace
from functools import partial

import numpy as np
import torch
from torch import nn

from trainers.core.batch import Batch, Sequence
from trainers.core.chat import ChatFormat
from trainers.core.checkpoint import Checkpoints
from trainers.core.context import Outcome, PhaseContext
from trainers.core.encode import Pair, preference_pairs
from trainers.core.examples import Encoding, Examples, open_examples
from trainers.core.export import save_model
from trainers.core.flops import model_flops
from trainers.core.head_losses import head_loss
from trainers.core.memory import print_memory
from trainers.core.models import LoadedModel, length_limit
from trainers.core.reward_models import new_reward_model
from trainers.core.rewards import check_reward_scoring, head_scores
from trainers.core.rows import Row
from trainers.core.scoring import hidden_states, target_logprobs
from trainers.core.step import Layout, Measures, accumulate, in_eval_mode, scored
from trainers.core.trainee import Trainee
from trainers.phases.reward import loss
from trainers.phases.reward.spec import RewardSpec


class RewardModule(nn.Module):
    """What is trained: the classifier and, with a language-model loss, the language head on the same backbone."""

    def __init__(self, classifier: nn.Module, language: nn.Module | None) -> None:
        super().__init__()
        self.classifier = classifier
        self.language = language

    def forward(self, batch: Batch, num_scored: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Scores, (S,), and the scored tokens' part of the mean loss over ``num_scored`` ones, (): 0 without them, or head."""
        hidden = hidden_states(self.classifier, batch)
        scores = head_scores(self.classifier, hidden, batch)
        if self.language is None or num_scored is None:
            return scores, scores.new_zeros(())

        def mean(logprobs: torch.Tensor, _: slice) -> torch.Tensor:
            return -logprobs.sum() / num_scored

        found, _ = head_loss(self.language, hidden[batch.scored_at], target_logprobs(batch), mean)
        return scores, found


def main(spec: RewardSpec, ctx: PhaseContext) -> Outcome:
    # ---- set up
    loaded, language = new_reward_model(ctx, spec.model, spec.lora)
    check_reward_scoring(loaded, ctx.workers)
    train = _pairs(spec, ctx, loaded, "train").steps(spec.batch_size, spec.duration.epochs, spec.duration.max_steps)
    eval_data = _pairs(spec, ctx, loaded, "eval") if spec.data.eval else None
    held_out = eval_data.everything() if eval_data else []
    layout = Layout(_sequences, spec.parallel.micro_batch_tokens, spec.data.packing and loaded.packs)
    module = RewardModule(loaded.model, language if spec.lm_weight else None)
    trainee = Trainee(ctx.workers, module, spec.optim, train.total_steps, model_flops(loaded.model))
    checkpoints = Checkpoints(ctx, spec.checkpoint, {"model": trainee})
    row = None if layout.packing else spec.data.max_length
    print_memory(ctx, [(trainee, loaded.model)], row=row)
    first = checkpoints.restore()
    ctx.meter.begin(first, train.total_steps, spec.document())

    # ---- loop
    for step in range(first, train.total_steps):
        batch = train.batch(step)

        def terms(pairs: list[Pair], micro: Batch, batch: list[Pair] = batch) -> tuple[torch.Tensor, Measures]:
            scores, language = trainee.module(micro, sum(pair.chosen.num_scored for pair in batch))
            return _loss(spec, pairs, batch, scores[: 2 * len(pairs)].view(-1, 2), language)

        sums = accumulate(ctx, trainee, layout, step, batch, terms)
        with ctx.meter.part("optimizer"):
            update = trainee.update(step)
        ctx.meter.log(step + 1, **sums, **update)
        if held_out and spec.evaluation.is_due(step + 1, train.total_steps):
            _evaluate(spec, ctx, trainee, layout, held_out, checkpoints, step + 1)
        checkpoints.after_step(step + 1, train.total_steps, train.ends_epoch(step))

    # ---- finish
    metrics: dict[str, float] = {}
    if held_out:
        metrics = _evaluate(spec, ctx, trainee, layout, held_out, checkpoints, train.total_steps)
    if held_out and spec.evaluation.keep_best:
        checkpoints.load_best("model")
        metrics = _held_out_metrics(ctx, trainee, layout, held_out)
    metrics["parameters"] = loaded.num_parameters
    save_model(ctx, loaded)
    return Outcome(metrics, train.records() + (eval_data.all_records() if eval_data else []), train.total_steps)


def _pairs(spec: RewardSpec, ctx: PhaseContext, loaded: LoadedModel, part: str) -> Examples[Pair]:
    encode = partial(
        _encode,
        loaded.chat,
        max_length=length_limit(loaded, spec.data.max_length),
        use_margin=spec.use_margin,
    )
    encoding = Encoding(spec.row_schemas()["data"], encode, Pair)
    return open_examples(ctx, getattr(spec.data, part), encoding, spec.data, f"data.{part}")


def _encode(chat: ChatFormat, row: Row, max_length: int, use_margin: bool) -> list[Pair]:
    margin = float(row["margin"]) if use_margin else 0.0
    return [replace(pair, margin=margin) for pair in preference_pairs(chat, row, max_length)]


def _sequences(pair: Pair) -> list[Sequence]:
    """Chosen and rejected; tokens are scored for the language-model loss, in the chosen one only."""
    return [pair.chosen, replace(pair.rejected, scored=np.zeros_like(pair.rejected.scored))]


def _loss(
    spec: RewardSpec, pairs: list[Pair], batch: list[Pair], scores: torch.Tensor, language: torch.Tensor
) -> tuple[torch.Tensor, Measures]:
    """These pairs' part of the loss of the step's whole batch, and of its measures; ``scores`` are (P, 2).

    Without pairs the sums are empty, but still reach every weight: all processes must take part in the backward pass.
    """
    chosen, rejected = scores.unbind(1)
    margin = torch.tensor([pair.margin for pair in pairs], device=scores.device)
    pair_loss = loss.bradley_terry(chosen, rejected, margin)
    if spec.centering:
        pair_loss = pair_loss + spec.centering * loss.centering(chosen, rejected)
    total = pair_loss.sum() / len(batch)
    if spec.lm_weight:
        total = total + spec.lm_weight * language
    difference = (chosen - rejected).detach()
    right = loss.right(difference)
    return total, {"accuracy": right.sum() / len(batch), "reward": difference.sum() / len(batch)}


def _evaluate(
    spec: RewardSpec,
    ctx: PhaseContext,
    trainee: Trainee,
    layout: Layout[Pair],
    held_out: list[Pair],
    checkpoints: Checkpoints,
    step: int,
) -> dict[str, float]:
    """Metrics on held-out pairs; keeps the weights if they are the best so far."""
    with ctx.meter.part("evaluation"):
        metrics = _held_out_metrics(ctx, trainee, layout, held_out)
    ctx.meter.record(step, eval_loss=metrics["evalLoss"], eval_accuracy=metrics["evalAccuracy"])
    if spec.evaluation.keep_best:
        checkpoints.keep_best("model", metrics["evalLoss"], higher_is_better=False)
    return metrics


def _held_out_metrics(
    ctx: PhaseContext, trainee: Trainee, layout: Layout[Pair], held_out: list[Pair]
) -> dict[str, float]:
    """Final metrics, the same on all processes. `evalLoss` is the preference loss alone, without centring."""

    def score(pairs: list[Pair], micro: Batch) -> list[list[float]]:
        scores, _ = trainee.module(micro)
        return scores[: 2 * len(pairs)].view(-1, 2).tolist()

    with in_eval_mode(trainee.module):
        chosen, rejected = torch.tensor(scored(ctx.workers, layout, held_out, score)).unbind(1)
    lengths = torch.tensor([[pair.chosen.num_scored, pair.rejected.num_scored] for pair in held_out])
    margin = torch.tensor([pair.margin for pair in held_out])
    scores = torch.cat([chosen, rejected])
    found = {
        "evalAccuracy": loss.accuracy(chosen, rejected),
        "evalLoss": loss.bradley_terry(chosen, rejected, margin).mean(),
        "evalCalibrationError": loss.calibration_error(chosen, rejected),
        "evalMargin": (chosen - rejected).mean(),
        "lengthBaselineAccuracy": loss.length_baseline(*lengths.unbind(1)),
        "rewardMean": scores.mean(),
        "rewardStd": scores.std(correction=0),
        "lengthCorrelation": loss.correlation(scores, lengths.T.flatten()),
    }
    return {name: value.item() for name, value in found.items()}

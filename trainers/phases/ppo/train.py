"""Proximal policy optimization against a reward model (Ouyang et al. 2022; details as in Huang et al. 2024).

A step is a round: respond to a batch of prompts, score the responses, then several passes of clipped updates over them.
All ranks hold the whole round's numbers, so advantages are whitened over all of it and every reduction is global.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from trainers.contract import BadInput
from trainers.core.batch import Batch, BatchOrder, collate, plan_micro_batches
from trainers.core.checkpoint import Checkpoints
from trainers.core.context import Outcome, PhaseContext
from trainers.core.export import save_model
from trainers.core.flops import ModelFlops, model_flops
from trainers.core.models import LoadedModel, load_causal_lm
from trainers.core.reward_models import load_reward_model
from trainers.core.rollouts import check_room, read_prompts, respond
from trainers.core.scoring import Scorer, check_scoring, target_logprobs
from trainers.core.trainee import Trainee
from trainers.core.vocabulary import same_tokens
from trainers.phases.ppo.advantages import explained_variance
from trainers.phases.ppo.experience import Critic, Experience, TokenScores, assess
from trainers.phases.ppo.loss import adapted_coef, clipped, kl_estimate, policy_loss, value_loss
from trainers.phases.ppo.spec import PpoSpec


def main(spec: PpoSpec, ctx: PhaseContext) -> Outcome:
    # ---- set up
    loaded = load_causal_lm(ctx, spec.policy)
    reference = load_causal_lm(ctx, spec.reference or spec.policy, frozen=True, like=loaded)
    reward_model = load_reward_model(ctx, spec.reward_model)
    critic_model = load_reward_model(ctx, spec.reward_model, frozen=False)
    _check_models(ctx, loaded, reference, critic_model)
    data, prompts = read_prompts(ctx, spec.data, loaded.chat, "data")
    check_room(loaded, prompts, spec.sampling)
    order = BatchOrder(len(prompts), spec.batch_size, 1, spec.iterations, ctx.seed)
    updates = spec.iterations * updates_per_round(spec)
    policy = Trainee(ctx.workers, Scorer(loaded.model), spec.optim, updates)
    critic = Trainee(ctx.workers, Critic(critic_model.model), spec.critic_optim, updates)
    checkpoints = Checkpoints(ctx, spec.checkpoint, {"policy": policy, "critic": critic})
    checkpoints.state = {"kl_coef": spec.kl.coef}
    first = checkpoints.restore()
    state = checkpoints.state
    flops = (model_flops(loaded.model), model_flops(critic_model.model))
    ctx.meter.begin(first, spec.iterations, spec.document())

    # ---- loop
    for iteration in range(first, spec.iterations):
        with ctx.meter.part("rollout"):
            chosen = [prompts[i] for i in order.indices(iteration)]
            keys = [(ctx.seed, iteration, i) for i in range(len(chosen))]
            samples = respond(
                ctx.workers, loaded, chosen, spec.sampling, keys, reward_model, spec.parallel.micro_batch_tokens
            )
            experience = assess(
                spec,
                ctx.workers,
                samples,
                state["kl_coef"],
                logprobs_of(policy.module, spec.sampling.temperature),
                _frozen(ctx, logprobs_of(Scorer(reference.model), spec.sampling.temperature)),
                critic.module,
            )
        losses = optimise(spec, ctx, policy, critic, experience, iteration, flops)
        summary = _summary(experience)
        ctx.meter.log(iteration + 1, **losses, **summary, kl_coef=state["kl_coef"])
        state.setdefault("rewardFirst", summary["reward"])
        state["last"] = summary
        if spec.kl.target is not None:
            state["kl_coef"] = adapted_coef(
                state["kl_coef"], summary["kl_sequence"], spec.kl.target, len(samples), spec.kl.horizon
            )
        checkpoints.after_step(iteration + 1, spec.iterations, (iteration + 1) % order.steps_per_epoch == 0)

    # ---- finish
    if ctx.workers.is_main:
        ctx.meter.stage("saving")
        save_model(loaded, ctx.dir.model)
    metrics = {
        "rewardFirst": state["rewardFirst"],
        "rewardLast": state["last"]["reward"],
        "klLast": state["last"]["kl"],
        "klSequenceLast": state["last"]["kl_sequence"],
        "klCoefLast": state["kl_coef"],
        "responseLengthLast": state["last"]["response_length"],
        "endedShareLast": state["last"]["ended_share"],
        "parameters": loaded.num_parameters,
    }
    return Outcome(metrics, data.records, spec.iterations)


def updates_per_round(spec: PpoSpec) -> int:
    """Optimizer steps of a round that is not ended early; the schedules run over these."""
    return spec.ppo_epochs * (spec.batch_size // (spec.mini_batch_size or spec.batch_size))


def optimise(
    spec: PpoSpec,
    ctx: PhaseContext,
    policy: Trainee,
    critic: Trainee,
    experience: Experience,
    iteration: int,
    flops: Sequence[ModelFlops],
) -> dict[str, float]:
    """The round's updates of policy and critic. Returns the means of their metrics over the updates made."""
    size = spec.mini_batch_size or spec.batch_size
    made: list[dict[str, float]] = []
    for epoch in range(spec.ppo_epochs):
        shuffled = np.random.default_rng([ctx.seed, iteration, epoch]).permutation(spec.batch_size)
        for start in range(0, spec.batch_size, size):
            mini = shuffled[start : start + size].tolist()
            sums = _gradients(spec, ctx, policy, critic, experience, mini, flops)
            if spec.max_kl_per_update is not None and sums["approx_kl"] > spec.max_kl_per_update:
                policy.discard_gradients()
                critic.discard_gradients()
                return _mean(made)
            step = iteration * updates_per_round(spec) + len(made)
            with ctx.meter.part("optimizer"):
                update = policy.update(step)
                critic_update = critic.update(step)
            made.append({**sums, **update, "critic_grad_norm": critic_update["grad_norm"]})
    return _mean(made)


def _gradients(
    spec: PpoSpec,
    ctx: PhaseContext,
    policy: Trainee,
    critic: Trainee,
    experience: Experience,
    mini: list[int],
    flops: Sequence[ModelFlops],
) -> dict[str, float]:
    """Gradients of a mini-batch's mean losses over its tokens, all ranks together. Returns the means."""
    sequences = [experience.sequences[i] for i in mini]
    micro_batches = plan_micro_batches(
        [[len(s)] for s in sequences], spec.parallel.micro_batch_tokens, spec.packing, ctx.workers.world
    )[ctx.workers.rank]
    num_tokens = sum(s.num_scored for s in sequences)
    sums = torch.zeros(4, device=ctx.workers.device)
    for i, places in enumerate(micro_batches):
        with ctx.meter.part("forward_backward"):
            chosen = [mini[j] for j in places]
            batch = collate([experience.sequences[j] for j in chosen], spec.packing, ctx.workers.device)
            old, advantages, old_values, returns = (
                experience.flat(name, chosen, ctx.workers.device)
                for name in ("logprobs", "advantages", "values", "returns")
            )
            logprobs = logprobs_of(policy.module, spec.sampling.temperature)(batch)
            policy_term = policy_loss(logprobs, old, advantages, spec.clip_range).sum() / num_tokens
            last = i == len(micro_batches) - 1
            policy.backward(policy_term, last)
            values = critic.module(batch)
            value_term = value_loss(values, old_values, returns, spec.value_clip_range).sum() / num_tokens
            critic.backward(value_term, last)
            with torch.no_grad():
                moved = kl_estimate(old, logprobs, "k3").sum() / num_tokens
                outside = clipped(logprobs, old, spec.clip_range).sum() / num_tokens
                sums += torch.stack([policy_term, value_term, moved, outside])
            used = [experience.sequences[j] for j in chosen]
            cost = sum(f.training(map(len, used), sum(s.num_scored for s in used)) for f in flops)
            ctx.meter.count(sum(map(len, used)), len(used), cost)
    policy_mean, value_mean, approx_kl, clip_fraction = ctx.workers.sum(sums).tolist()
    return {
        "loss": policy_mean + value_mean,
        "policy_loss": policy_mean,
        "value_loss": value_mean,
        "approx_kl": approx_kl,
        "clip_fraction": clip_fraction,
    }


def logprobs_of(scorer: nn.Module, temperature: float) -> TokenScores:
    """Log-probabilities at the temperature that responses were sampled with."""

    def scores(batch: Batch) -> torch.Tensor:
        found: torch.Tensor = scorer(batch, target_logprobs(batch, temperature))
        return found

    return scores


def _frozen(ctx: PhaseContext, scores: TokenScores) -> TokenScores:
    def run(batch: Batch) -> torch.Tensor:
        with ctx.workers.autocast():
            return scores(batch)

    return run


def _check_models(ctx: PhaseContext, policy: LoadedModel, reference: LoadedModel, critic: LoadedModel) -> None:
    """Raise BadInput unless all read the policy's tokens; and take dropout out of what is trained.

    With dropout the ratio of new to old probability is noise even before the first update.
    """
    for name, other in (("reference", reference), ("rewardModel (the critic starts from it)", critic)):
        problem = same_tokens(policy.tokenizer, other.tokenizer)
        if problem:
            raise BadInput(f"{name}: its tokenizer is not the policy's: {problem.replace('teacher', 'policy')}")
    check_scoring(policy, ctx.workers)
    check_scoring(reference, ctx.workers)
    for loaded in (policy, critic):
        for module in loaded.model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
            if isinstance(getattr(module, "attention_dropout", None), float):
                module.attention_dropout = 0.0


def _summary(experience: Experience) -> dict[str, float]:
    """What the round's responses were like, before its updates."""
    samples, mask = experience.samples, experience.mask
    logprobs, reference = experience.logprobs, experience.reference_logprobs
    return {
        "reward": sum(s.reward for s in samples) / len(samples),
        # Per token the estimate that is never negative; per response the one that the controller is about.
        "kl": float(kl_estimate(logprobs, reference, "k3")[mask].mean()),
        "kl_sequence": float(kl_estimate(logprobs, reference, "k1").sum(1).mean()),
        # -log q of the sampled tokens: an unbiased estimate, and free.
        "entropy": float(-logprobs[mask].mean()),
        "value_explained_variance": explained_variance(experience.returns, experience.values, mask),
        "response_length": float(mask.sum(1).double().mean()),
        "ended_share": sum(s.ended for s in samples) / len(samples),
    }


def _mean(updates: list[dict[str, Any]]) -> dict[str, float]:
    return {key: sum(u[key] for u in updates) / len(updates) for key in updates[0]} | {"updates": len(updates)}

"""Proximal policy optimization against a reward model (Ouyang et al. 2022; details as in Huang et al. 2024).

A step is a round: respond to a batch of prompts, score the responses, then several passes of clipped updates over them.
All ranks hold the whole round's numbers, so advantages are whitened over all of it and every reduction is global.
"""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

from trainers.core.batch import Batch, Packing
from trainers.core.checkpoint import Checkpoints
from trainers.core.context import Outcome, PhaseContext
from trainers.core.dropout import take_out_dropout
from trainers.core.export import save_model
from trainers.core.flops import model_flops
from trainers.core.importance import Importance, sampler_logprobs, token_importance
from trainers.core.memory import print_memory
from trainers.core.models import LoadedModel, load_causal_lm
from trainers.core.reference import Reference, load_reference
from trainers.core.reward_models import load_reward_model
from trainers.core.rollouts import Prompt, check_room, open_prompts
from trainers.core.rollouts_ahead import RolloutsAhead
from trainers.core.scoring import Scorer, check_scoring, target_logprobs
from trainers.core.step import Layout, Measures, accumulate
from trainers.core.token_scores import TokenScores, logprobs_of
from trainers.core.trainee import Trainee
from trainers.core.vocabulary import check_known, lowest
from trainers.phases.ppo.advantages import explained_variance
from trainers.phases.ppo.critic import load_critic
from trainers.phases.ppo.experience import Critic, Experience, assess
from trainers.phases.ppo.loss import adapted_coef, clipped, kl_estimate, policy_loss, value_loss
from trainers.phases.ppo.spec import PpoSpec


def main(spec: PpoSpec, ctx: PhaseContext) -> Outcome:
    with ExitStack() as held:  # however it ends, nobody samples for rounds that do not come
        return _train(spec, ctx, held)


def _train(spec: PpoSpec, ctx: PhaseContext, held: ExitStack) -> Outcome:
    # ---- set up
    loaded = load_causal_lm(ctx, spec.policy, spec.lora)
    check_scoring(loaded, ctx.workers)
    reference = load_reference(ctx, spec.reference, spec.policy, loaded)
    reward_model = load_reward_model(ctx, spec.reward_model)
    critic_model = load_critic(ctx, spec, loaded, reward_model)
    take_out_dropout(loaded.model)
    take_out_dropout(critic_model.model)
    check = _only_known_tokens(spec, loaded, {"reference": reference.loaded, "critic": critic_model})
    prompts = open_prompts(ctx, spec.data, loaded.chat, "data", check).steps(
        spec.batch_size, 1, spec.iterations, full=True
    )
    updates = spec.iterations * updates_per_round(spec)
    policy = Trainee(ctx.workers, Scorer(loaded.model), spec.optim, updates, model_flops(loaded.model))
    critic = Trainee(
        ctx.workers, Critic(critic_model.model), spec.critic_optim, updates, model_flops(critic_model.model)
    )
    packing = spec.packing and min(loaded.packs, reference.loaded.packs, critic_model.packs)
    rollouts = RolloutsAhead(ctx, spec, loaded, prompts.batch, spec.iterations, reward_model)
    held.callback(rollouts.close)
    checkpoints = Checkpoints(ctx, spec.checkpoint, {"policy": policy, "critic": critic}, rollouts)
    checkpoints.state = {"kl_coef": spec.kl.coef}
    print_memory(
        ctx,
        [(policy, loaded.model), (critic, critic_model.model)],
        [reference.loaded.model, reward_model.model, *rollouts.models],
        None if packing else spec.data.max_prompt_length + spec.sampling.max_new_tokens,
    )
    first = checkpoints.restore()
    state = checkpoints.state
    rollouts.start(first)
    ctx.meter.begin(first, spec.iterations, spec.document())

    # ---- loop
    for iteration in range(first, spec.iterations):
        with ctx.meter.part("rollout"):
            samples = rollouts.samples(iteration)
            experience = assess(
                spec,
                ctx.workers,
                samples,
                state["kl_coef"],
                logprobs_of(policy.module, spec.sampling.temperature),
                _reference_logprobs(reference, spec.sampling.temperature),
                critic.module,
                packing,
            )
        mismatch = {}
        if spec.corrects:
            importance = importance_of(spec, experience)
            experience = replace(experience, importance=importance.weights)
            mismatch = importance.measures | {"staleness": min(iteration, spec.staleness)}
        losses = optimise(spec, ctx, policy, critic, experience, iteration, packing)
        summary = _summary(experience)
        ctx.meter.log(iteration + 1, **losses, **summary, **mismatch, kl_coef=state["kl_coef"])
        state.setdefault("rewardFirst", summary["reward"])
        state["last"] = summary
        if spec.kl.target is not None:
            state["kl_coef"] = adapted_coef(
                state["kl_coef"], summary["kl_sequence"], spec.kl.target, len(samples), spec.kl.horizon
            )
        checkpoints.after_step(iteration + 1, spec.iterations, prompts.ends_epoch(iteration))

    # ---- finish
    save_model(ctx, loaded)
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
    return Outcome(metrics, prompts.records(), spec.iterations)


def importance_of(spec: PpoSpec, experience: Experience) -> Importance:
    """What a round's tokens weigh: the policy before the round's updates, to which their ratios are too, over the sampler."""
    sampler = sampler_logprobs(experience.samples, experience.mask.shape[1])
    return token_importance(experience.logprobs, sampler, experience.mask, spec.importance_cap)


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
    packing: bool | Packing,
) -> dict[str, float]:
    """The round's updates of policy and critic. Returns the means of their metrics over the updates made."""
    size = spec.mini_batch_size or spec.batch_size
    layout = Layout[int](lambda i: [experience.sequences[i]], spec.parallel.micro_batch_tokens, packing)
    first = iteration * updates_per_round(spec)
    made: list[dict[str, float]] = []
    for epoch in range(spec.ppo_epochs):
        shuffled = np.random.default_rng([ctx.seed, iteration, epoch]).permutation(spec.batch_size)
        for start in range(0, spec.batch_size, size):
            mini = shuffled[start : start + size].tolist()
            step = first + len(made)
            terms = partial(policy_terms, spec, policy.module, experience, mini)
            sums = accumulate(ctx, policy, layout, step, mini, terms)
            # Before the first update nothing has moved: what is measured then is rounding alone.
            if spec.max_kl_per_update is not None and made and sums["approx_kl"] > spec.max_kl_per_update:
                policy.engine.discard_gradients()
                return _mean(made)
            value_terms = partial(critic_terms, spec, critic.module, experience, mini)
            values = accumulate(ctx, critic, layout, step, mini, value_terms, counted=False)
            with ctx.meter.part("optimizer"):
                update, critic_update = policy.update(step), critic.update(step)
            losses = {
                "loss": sums["loss"] + values["loss"],
                "policy_loss": sums["loss"],
                "value_loss": values["loss"],
                "critic_grad_norm": critic_update["grad_norm"],
            }
            made.append({**sums, **losses, **update})
    return _mean(made)


def policy_terms(
    spec: PpoSpec, module: nn.Module, experience: Experience, mini: list[int], chosen: list[int], batch: Batch
) -> tuple[torch.Tensor, Measures]:
    """Some responses' part of the mean clipped loss over the tokens of ``mini``, and how far the policy has moved."""
    device = batch.input_ids.device
    old, advantages = (experience.flat(name, chosen, device) for name in ("logprobs", "advantages"))
    weights = None if experience.importance is None else experience.flat("importance", chosen, device)
    num_tokens = experience.num_tokens(mini)

    def clipped_loss(logprobs: torch.Tensor, at: slice) -> torch.Tensor:
        losses = policy_loss(logprobs, old[at], advantages[at], spec.clip_range)
        return (losses if weights is None else weights[at] * losses).sum() / num_tokens

    loss, logprobs = module(batch, target_logprobs(batch, spec.sampling.temperature), clipped_loss)
    moved = kl_estimate(old, logprobs, "k3").sum() / num_tokens
    outside = clipped(logprobs, old, spec.clip_range).sum() / num_tokens
    return loss, {"approx_kl": moved, "clip_fraction": outside}


def critic_terms(
    spec: PpoSpec, module: nn.Module, experience: Experience, mini: list[int], chosen: list[int], batch: Batch
) -> tuple[torch.Tensor, Measures]:
    """Some responses' part of the mean clipped value loss over the tokens of ``mini``."""
    device = batch.input_ids.device
    old, returns = (experience.flat(name, chosen, device) for name in ("values", "returns"))
    return value_loss(module(batch), old, returns, spec.value_clip_range).sum() / experience.num_tokens(mini), {}


def _reference_logprobs(reference: Reference, temperature: float) -> TokenScores:
    score = logprobs_of(Scorer(reference.loaded.model), temperature)

    def scores(batch: Batch) -> torch.Tensor:
        with reference.scoring():
            return score(batch)

    return scores


def _only_known_tokens(
    spec: PpoSpec, policy: LoadedModel, readers: dict[str, LoadedModel]
) -> Callable[[list[Prompt]], None]:
    """Let the policy say nothing that a reader cannot embed; raises BadInput for prompts that one cannot, or without room."""
    policy.num_known = lowest(policy.num_known, *(reader.num_known for reader in readers.values()))

    def check(prompts: list[Prompt]) -> None:
        check_room(policy, prompts, spec.sampling, spec.server)
        for name, reader in readers.items():
            check_known((p.ids for p in prompts), reader.num_known, policy.tokenizer, "data.prompts", name)

    return check


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

"""Teacher rollouts: a model's responses to prompts, with their rewards, as ``traces.jsonl``.

A step is one batch of responses on every process. Response i is a function of the seed and i alone, so neither a
restart nor another number of processes changes it.
"""

import statistics
from collections.abc import Iterable
from functools import partial
from typing import Any

import numpy as np
import torch

from trainers import jsonl
from trainers.contract import BadInput
from trainers.core import top_k
from trainers.core.batch import Batch, Sequence
from trainers.core.classifiers import RewardModel
from trainers.core.context import ARTIFACT_NAMES, Outcome, PhaseContext
from trainers.core.encode import joined
from trainers.core.examples import Examples, InOrder
from trainers.core.models import LoadedModel, load_causal_lm
from trainers.core.parallel import Workers
from trainers.core.reward_models import load_reward_model
from trainers.core.rollouts import Prompt, Sample, check_room, open_prompts, respond
from trainers.core.scoring import Scorer, check_scoring
from trainers.core.served.model import ServedModel, own_served_model, served_model
from trainers.core.served.server import side_by_side
from trainers.core.shares import in_order
from trainers.core.step import Layout, scored
from trainers.core.vocabulary import same_tokens
from trainers.files import replaced
from trainers.phases.rollout.parts import Parts
from trainers.phases.rollout.spec import RolloutSpec
from trainers.phases.rollout.tokens import check_tokens
from trainers.smaller import of_responses, times_halved

Row = dict[str, Any]


def main(spec: RolloutSpec, ctx: PhaseContext) -> Outcome:
    # ---- set up
    policy = _policy(spec, ctx)
    reward_model = load_reward_model(ctx, spec.reward_model) if spec.reward_model else None
    room = partial(check_room, policy, sampling=spec.sampling, scored=spec.teacher_top_k is not None)
    data = open_prompts(ctx, spec.data, policy.chat, "data", room)
    _check_top_k(spec, ctx, policy)
    checked = _token_check(policy, reward_model, data) if spec.sampling.max_new_tokens == 1 else {}
    parts = Parts(ctx.dir.checkpoints, partial(top_k.check_shards, ctx.dir.root / top_k.FOLDER))
    # One process reads for all: with a folder per node the others may lack some.
    first = ctx.workers.from_main(parts.done)
    prompts = InOrder(data, first // spec.samples_per_prompt)
    total = len(prompts) * spec.samples_per_prompt
    own_share = -(-total // ctx.workers.world)
    sampling = of_responses(spec.sampling, own_share, times_halved())
    size = sampling.batch_size * ctx.workers.world
    total_steps = -(-total // size)
    ctx.workers.barrier()
    ctx.meter.begin(first // size, total_steps, spec.document())
    ctx.meter.will_checkpoint(first // size)

    # ---- loop
    while first < total:
        last = min(first + size, total)
        with ctx.meter.part("rollout"):
            chosen = _asked(prompts, range(first, last), spec.samples_per_prompt)
            while not chosen and last < total:
                ahead = range(last, last := min(last + size, total))
                chosen = _asked(prompts, ahead, spec.samples_per_prompt)
            if not chosen:
                break
            keys = [(ctx.seed, number) for number, _ in chosen]
            asked = [prompt for _, prompt in chosen]
            samples = respond(
                ctx.workers, policy, asked, sampling, keys, reward_model, spec.parallel.micro_batch_tokens
            )
            done = _with_scores(spec, ctx, policy, first, samples)
        step = -(-last // size)
        if ctx.workers.is_main:
            with ctx.meter.part("checkpoint"):
                ctx.keep(parts.write(first, last, done))
        first = last
        ctx.meter.checkpointed(step)
        mine = done[ctx.workers.rank :: ctx.workers.world]
        ctx.meter.count(sum(row["tokens"] for row in mine), len(mine))
        summary = _summary(done)
        ctx.meter.log(
            step,
            reward=summary["rewardMean"],
            response_length=summary["tokensMean"],
            ended_share=summary["endedShare"],
        )
        if first < total:
            ctx.stop_if_asked()

    # ---- finish
    if ctx.workers.is_main:
        top_k.drop_others(ctx.dir.root / top_k.FOLDER, parts.rows())
        with replaced(ctx.dir.root / ARTIFACT_NAMES["traces"]) as file:
            for row in parts.rows():
                file.write(jsonl.dump({key: value for key, value in row.items() if key != "tokens"}).encode())
    summary = ctx.workers.from_main(lambda: _summary(parts.rows()))
    return Outcome(summary | checked, data.all_records(), total_steps)


def _policy(spec: RolloutSpec, ctx: PhaseContext) -> LoadedModel | ServedModel:
    """Who responds. Weights that a server has are here only while another's is checked by them."""
    if spec.sampling.engine == "own":
        return load_causal_lm(ctx, spec.policy, frozen=True)
    if spec.policy.url is None:
        kept = spec.teacher_top_k or 0
        return ctx.closing.enter_context(own_served_model(ctx, "policy", spec.policy, spec.server, kept))
    weights = load_causal_lm(ctx, spec.policy, frozen=True) if spec.policy.check_weights else None
    return served_model(ctx, "policy", spec.policy, weights)


def _asked(prompts: InOrder[Prompt], responses: range, each: int) -> list[tuple[int, Prompt]]:
    """(number of the response, prompt to respond to) of these responses; none to a prompt that cannot be used."""
    numbers = range(responses.start // each, -(-responses.stop // each))
    found = {number: prompts[number] for number in numbers}
    return [(i, prompt) for i in responses for prompt in found[i // each]]


def _check_top_k(spec: RolloutSpec, ctx: PhaseContext, policy: LoadedModel | ServedModel) -> None:
    """Raise BadInput if the policy cannot be scored, or does not know as many tokens as are to be kept."""
    if spec.teacher_top_k is None:
        return
    if isinstance(policy, LoadedModel):
        check_scoring(policy, ctx.workers)
    if policy.num_known is not None and spec.teacher_top_k > policy.num_known:
        raise BadInput(f"teacherTopK {spec.teacher_top_k}: the policy knows {policy.num_known} tokens")


def _with_scores(
    spec: RolloutSpec, ctx: PhaseContext, policy: LoadedModel | ServedModel, first: int, samples: list[Sample]
) -> list[Row]:
    """Rows of a batch, with the place of what the policy says of their tokens if that is kept: it is on disk then."""
    rows = [_row(sample) for sample in samples]
    if spec.teacher_top_k is None:
        return rows
    found = _scores(spec, ctx, policy, samples)
    if ctx.workers.is_main:
        assert policy.num_known is not None, "a policy has a tokenizer"
        known, vocabulary = policy.num_known, top_k.vocabulary_digest(policy.tokenizer)
        shard = top_k.write_shard(ctx.dir.root / top_k.FOLDER, first, found, known, vocabulary)
        ctx.keep(shard)
        return [row | {top_k.KEY: {"file": shard.name, "row": i}} for i, row in enumerate(rows)]
    return rows


def _scores(
    spec: RolloutSpec, ctx: PhaseContext, policy: LoadedModel | ServedModel, samples: list[Sample]
) -> list[top_k.Scored]:
    """By a second pass over the tokens as they were sampled; generation has logits of the sampling's temperature alone."""
    assert spec.teacher_top_k is not None
    if isinstance(policy, ServedModel):
        found = _served_scores(policy, ctx.workers, samples, spec.teacher_top_k, spec.sampling.batch_size)
    else:
        found = _own_scores(spec, ctx, policy, samples)
    return [top_k.Scored(s.prompt.ids, s.ids, part) for s, part in zip(samples, found, strict=True)]


def _served_scores(
    policy: ServedModel, workers: Workers, samples: list[Sample], k: int, width: int
) -> list[np.ndarray]:
    def ask(sample: Sample) -> np.ndarray:
        whole, first = sample.prompt.ids + sample.ids, len(sample.prompt.ids)
        return policy.wire.likeliest(whole, first, k, policy.num_known)

    mine = range(len(samples))[workers.rank :: workers.world]
    return in_order(workers, mine, side_by_side(ask, [samples[i] for i in mine], width, policy.wire.server.look))


def _own_scores(spec: RolloutSpec, ctx: PhaseContext, loaded: LoadedModel, samples: list[Sample]) -> list[np.ndarray]:
    assert spec.teacher_top_k is not None
    keep = top_k.likeliest(spec.teacher_top_k, loaded.num_known)
    layout = Layout(_sequences, spec.parallel.micro_batch_tokens, loaded.packs)
    scorer = Scorer(loaded.model)

    def score(some: list[Sample], batch: Batch) -> list[np.ndarray]:
        found = scorer(batch, keep)
        assert isinstance(found, torch.Tensor)
        return [part.cpu().numpy() for part in found.split(batch.counts().tolist())][: len(some)]

    return scored(ctx.workers, layout, samples, score)


def _sequences(sample: Sample) -> list[Sequence]:
    """Prompt and response, the latter scored."""
    whole = joined(sample.prompt.ids, sample.ids, len(sample.prompt.ids) + len(sample.ids))
    assert whole is not None
    return [whole]


def _row(sample: Sample) -> Row:
    chat: Row = {key: sample.prompt.row[key] for key in ("messages", "tools", "teacher") if key in sample.prompt.row}
    answer = {"prompt": sample.prompt.text, "teacher_response": sample.text, "reward": sample.reward}
    return {**answer, **chat, "ended": sample.ended, "tokens": len(sample.ids)}


def _summary(rows: Iterable[Row]) -> dict[str, float]:
    """Of rows that are not held: 24 bytes of each are."""
    numbers = ((row["reward"], row["tokens"], row["ended"]) for row in rows)
    rewards, tokens, ended = np.fromiter(numbers, dtype=(np.float64, 3)).T
    return {
        "responses": len(rewards),
        "rewardMean": float(statistics.fmean(rewards)),
        "rewardStd": float(statistics.pstdev(rewards)),
        "tokensMean": float(statistics.fmean(tokens)),
        "endedShare": float(statistics.fmean(ended)),
    }


def _token_check(
    policy: LoadedModel | ServedModel, reward_model: RewardModel | None, data: Examples[Prompt]
) -> dict[str, float]:
    """What ``--max-new-tokens 1`` is for. Raises BadInput when prompts do not become sane tokens."""
    metrics = check_tokens(policy.chat, data.each(), "policy")
    if reward_model is not None:
        difference = same_tokens(reward_model.tokenizer, policy.tokenizer)
        metrics["rewardModelSameTokens"] = float(difference is None)
        if difference is not None:
            print(f"the reward model reads responses as text, its tokens are others: {difference}")
            if isinstance(reward_model, LoadedModel):
                check_tokens(reward_model.chat, data.each(), "rewardModel")
    print(f"tokens of all prompts checked: {metrics}")
    return metrics

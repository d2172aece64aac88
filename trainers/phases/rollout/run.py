"""Teacher rollouts: a model's responses to prompts, with their rewards, as ``traces.jsonl``.

A step is one batch of responses on every process. Response i is a function of the seed and i alone, so neither a
restart nor another number of processes changes it.
"""

import statistics
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
from trainers.core.models import LoadedModel, load_causal_lm
from trainers.core.reward_models import load_reward_model
from trainers.core.rollouts import Prompt, Sample, check_room, open_prompts, respond
from trainers.core.scoring import Scorer, check_scoring
from trainers.core.step import Layout, scored
from trainers.core.vocabulary import same_tokens
from trainers.files import write_atomic
from trainers.phases.rollout.parts import Parts
from trainers.phases.rollout.spec import RolloutSpec
from trainers.phases.rollout.tokens import check_tokens

Row = dict[str, Any]


def main(spec: RolloutSpec, ctx: PhaseContext) -> Outcome:
    # ---- set up
    loaded = load_causal_lm(ctx, spec.policy, frozen=True)
    reward_model = load_reward_model(ctx, spec.reward_model) if spec.reward_model else None
    room = partial(check_room, loaded, sampling=spec.sampling)
    data = open_prompts(ctx, spec.data, loaded.chat, "data", room)
    prompts = data.everything()
    _check_top_k(spec, ctx, loaded)
    checked = _token_check(loaded, reward_model, prompts) if spec.sampling.max_new_tokens == 1 else {}
    wanted = [prompt for prompt in prompts for _ in range(spec.samples_per_prompt)]
    parts = Parts(ctx.dir.checkpoints, partial(top_k.check_shards, ctx.dir.root / top_k.FOLDER))
    # One process reads for all: with a folder per node the others may lack some.
    rows = ctx.workers.from_main(parts.read)
    size = spec.sampling.batch_size * ctx.workers.world
    total_steps = -(-len(wanted) // size)
    ctx.workers.barrier()
    ctx.meter.begin(len(rows) // size, total_steps, spec.document())
    ctx.meter.will_checkpoint(len(rows) // size)

    # ---- loop
    while (first := len(rows)) < len(wanted):
        batch = range(first, min(first + size, len(wanted)))
        with ctx.meter.part("rollout"):
            keys = [(ctx.seed, i) for i in batch]
            chosen = [wanted[i] for i in batch]
            samples = respond(
                ctx.workers, loaded, chosen, spec.sampling, keys, reward_model, spec.parallel.micro_batch_tokens
            )
            done = _with_scores(spec, ctx, loaded, first, samples)
        rows += done
        step = -(-len(rows) // size)
        if ctx.workers.is_main:
            with ctx.meter.part("checkpoint"):
                ctx.keep(parts.write(first, done))
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
        if len(rows) < len(wanted):
            ctx.stop_if_asked()

    # ---- finish
    if ctx.workers.is_main:
        top_k.drop_others(ctx.dir.root / top_k.FOLDER, rows)
        traces = [{key: value for key, value in row.items() if key != "tokens"} for row in rows]
        write_atomic(ctx.dir.root / ARTIFACT_NAMES["traces"], jsonl.dumps(traces))
    return Outcome(_summary(rows) | checked, data.all_records(), total_steps)


def _check_top_k(spec: RolloutSpec, ctx: PhaseContext, loaded: LoadedModel) -> None:
    """Raise BadInput if the policy cannot be scored, or does not know as many tokens as are to be kept."""
    if spec.teacher_top_k is None:
        return
    check_scoring(loaded, ctx.workers)
    if loaded.num_known is not None and spec.teacher_top_k > loaded.num_known:
        raise BadInput(f"teacherTopK {spec.teacher_top_k}: the policy knows {loaded.num_known} tokens")


def _with_scores(
    spec: RolloutSpec, ctx: PhaseContext, loaded: LoadedModel, first: int, samples: list[Sample]
) -> list[Row]:
    """Rows of a batch, with the place of what the policy says of their tokens if that is kept: it is on disk then."""
    rows = [_row(sample) for sample in samples]
    if spec.teacher_top_k is None:
        return rows
    found = _scores(spec, ctx, loaded, samples)
    if ctx.workers.is_main:
        known = loaded.num_known or loaded.model.get_output_embeddings().weight.shape[0]
        vocabulary = top_k.vocabulary_digest(loaded.tokenizer)
        shard = top_k.write_shard(ctx.dir.root / top_k.FOLDER, first, found, known, vocabulary)
        ctx.keep(shard)
        return [row | {top_k.KEY: {"file": shard.name, "row": i}} for i, row in enumerate(rows)]
    return rows


def _scores(spec: RolloutSpec, ctx: PhaseContext, loaded: LoadedModel, samples: list[Sample]) -> list[top_k.Scored]:
    """By a second pass over the tokens as they were sampled; generation has logits of the sampling's temperature alone."""
    assert spec.teacher_top_k is not None
    keep = top_k.likeliest(spec.teacher_top_k, loaded.num_known)
    layout = Layout(_sequences, spec.parallel.micro_batch_tokens, loaded.packs)
    scorer = Scorer(loaded.model)

    def score(some: list[Sample], batch: Batch) -> list[np.ndarray]:
        found = scorer(batch, keep)
        assert isinstance(found, torch.Tensor)
        return [part.cpu().numpy() for part in found.split(batch.counts().tolist())][: len(some)]

    found = scored(ctx.workers, layout, samples, score)
    return [top_k.Scored(s.prompt.ids, s.ids, part) for s, part in zip(samples, found, strict=True)]


def _sequences(sample: Sample) -> list[Sequence]:
    """Prompt and response, the latter scored."""
    whole = joined(sample.prompt.ids, sample.ids, len(sample.prompt.ids) + len(sample.ids))
    assert whole is not None
    return [whole]


def _row(sample: Sample) -> Row:
    chat: Row = {key: sample.prompt.row[key] for key in ("messages", "tools") if key in sample.prompt.row}
    answer = {"prompt": sample.prompt.text, "teacher_response": sample.text, "reward": sample.reward}
    return {**answer, **chat, "ended": sample.ended, "tokens": len(sample.ids)}


def _summary(rows: list[Row]) -> dict[str, float]:
    rewards = [row["reward"] for row in rows]
    return {
        "responses": len(rows),
        "rewardMean": statistics.fmean(rewards),
        "rewardStd": statistics.pstdev(rewards),
        "tokensMean": statistics.fmean(row["tokens"] for row in rows),
        "endedShare": statistics.fmean(row["ended"] for row in rows),
    }


def _token_check(loaded: LoadedModel, reward_model: RewardModel | None, prompts: list[Prompt]) -> dict[str, float]:
    """What ``--max-new-tokens 1`` is for. Raises BadInput when prompts do not become sane tokens."""
    metrics = check_tokens(loaded.chat, prompts, "policy")
    if reward_model is not None:
        difference = same_tokens(reward_model.tokenizer, loaded.tokenizer)
        metrics["rewardModelSameTokens"] = float(difference is None)
        if difference is not None:
            print(f"the reward model reads responses as text, its tokens are others: {difference}")
            if isinstance(reward_model, LoadedModel):
                check_tokens(reward_model.chat, prompts, "rewardModel")
    print(f"tokens of {len(prompts)} prompts checked: {metrics}")
    return metrics

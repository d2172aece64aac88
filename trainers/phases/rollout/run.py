"""Teacher rollouts: a model's responses to prompts, with their rewards, as ``traces.jsonl``.

A step is one batch of responses on every process. Response i is a function of the seed and i alone, so neither a
restart nor another number of processes changes it.
"""

import statistics
from functools import partial
from typing import Any

from trainers import jsonl
from trainers.core.classifiers import RewardModel
from trainers.core.context import ARTIFACT_NAMES, Outcome, PhaseContext
from trainers.core.models import LoadedModel, load_causal_lm
from trainers.core.reward_models import load_reward_model
from trainers.core.rollouts import Prompt, Sample, check_room, open_prompts, respond
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
    checked = _token_check(loaded, reward_model, prompts) if spec.sampling.max_new_tokens == 1 else {}
    wanted = [prompt for prompt in prompts for _ in range(spec.samples_per_prompt)]
    parts = Parts(ctx.dir.checkpoints)
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
        done = [_row(sample) for sample in samples]
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
        traces = [{key: value for key, value in row.items() if key != "tokens"} for row in rows]
        write_atomic(ctx.dir.root / ARTIFACT_NAMES["traces"], jsonl.dumps(traces))
    return Outcome(_summary(rows) | checked, data.all_records(), total_steps)


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

"""Prompts, the responses that a model gives to them, and their rewards: what ppo, rollout and distill have in common."""

from collections.abc import Callable
from collections.abc import Sequence as List
from dataclasses import dataclass, replace
from functools import cache, partial

import numpy as np
import torch

from trainers.contract import BadInput, Diverged
from trainers.core.chat import ChatFormat
from trainers.core.classifiers import RewardModel
from trainers.core.context import PhaseContext
from trainers.core.encode import prompt_ids, prompt_messages
from trainers.core.examples import Encoding, Examples, open_examples
from trainers.core.gathering import gathered
from trainers.core.generate import Response, generate
from trainers.core.graphs import recorder
from trainers.core.models import LoadedModel, context_length
from trainers.core.parallel import Workers
from trainers.core.rewards import response_rewards
from trainers.core.rows import Row
from trainers.core.served.model import ServedModel
from trainers.core.shares import in_order
from trainers.core.slots import fits_slots
from trainers.core.templates import Messages
from trainers.spec import OwnServer, PromptData, Sampling
from trainers.spec.server_flags import LENGTH_FLAG


@dataclass(frozen=True)
class Prompt:
    row: Row
    ids: list[int]
    """Tokens up to where the assistant starts to speak."""
    shortened: int = 0
    """Tokens that it has lost."""

    @property
    def messages(self) -> Messages:
        return prompt_messages(self.row)

    @property
    def text(self) -> str:
        """What the user asked last."""
        return str(self.messages[-1]["content"])


@dataclass(frozen=True)
class Sample:
    """A response to a prompt."""

    prompt: Prompt
    ids: list[int]
    """Generated tokens, the end token included."""
    text: str
    ended: bool
    """Whether it stopped by itself rather than at the length limit."""
    reward: float = 0.0
    logprobs: list[float] | None = None
    """Of each token: the model's own, at temperature 1 and of its whole vocabulary, as whoever made it has told."""


def open_prompts(
    ctx: PhaseContext, data: PromptData, chat: ChatFormat, where: str, check: Callable[[list[Prompt]], None]
) -> Examples[Prompt]:
    """Prompts; those longer than the limit are dropped and counted. Raises BadInput if none is left."""
    encoding = Encoding("prompt", partial(short_prompts, chat, data.max_prompt_length), Prompt, check)
    return open_examples(ctx, data.prompts, encoding, data, f"{where}.prompts")


def short_prompts(chat: ChatFormat, longest: int, row: Row) -> list[Prompt]:
    """What a row becomes: one that is longer, nothing."""
    ids = prompt_ids(chat, row)
    asked: Row = {key: row[key] for key in ("prompt", "messages", "tools", "teacher") if key in row}
    return [Prompt(asked, ids)] if len(ids) <= longest else []


def check_room(
    speaker: LoadedModel | ServedModel,
    prompts: List[Prompt],
    sampling: Sampling,
    server: OwnServer | None = None,
    scored: bool = False,
) -> None:
    """Raise BadInput if the longest prompt and response do not fit the model's positions, or those of its server.

    ``server``: one that is started later; ``scored``: whether one is asked about whole responses, and says a token more.
    """
    longest = max((len(p.ids) for p in prompts), default=0)
    limit = speaker.positions
    if longest + sampling.max_new_tokens > limit:
        raise BadInput(
            f"a prompt of {longest} tokens and sampling.maxNewTokens {sampling.max_new_tokens} do not fit the model's "
            f"{limit} positions: lower maxNewTokens or maxPromptLength"
        )
    if isinstance(speaker, ServedModel):
        speaker.wire.check_length(longest + sampling.max_new_tokens + scored)
    if server is not None and server.longest is not None and longest + sampling.max_new_tokens > server.longest:
        raise BadInput(
            f"a prompt of {longest} tokens and sampling.maxNewTokens {sampling.max_new_tokens} are more than {LENGTH_FLAG} "
            f"{server.longest} of server.args: set {longest + sampling.max_new_tokens}, or lower maxNewTokens or maxPromptLength"
        )


def respond(
    workers: Workers,
    speaker: LoadedModel | ServedModel,
    prompts: List[Prompt],
    sampling: Sampling,
    keys: List[tuple[int, ...]],
    reward_model: RewardModel | None = None,
    micro_batch_tokens: int = 8192,
) -> list[Sample]:
    """One response per prompt, in order and the same on all ranks, which share the work.

    ``keys[i]`` (seed, step, index, …) is all that response i's randomness comes from, so it is the same for any number
    of processes. Rewards are 0 without a reward model. Raises Diverged when a reward is not finite.
    """
    mine = range(len(prompts))[workers.rank :: workers.world]
    asked, of_mine = [prompts[i].ids for i in mine], [keys[i] for i in mine]
    if isinstance(speaker, ServedModel):
        found = speaker.responses(asked, sampling, of_mine)
    else:
        found = own_responses(workers, speaker, asked, sampling, of_mine)
    samples = said(speaker.chat, prompts, in_order(workers, mine, found))
    return samples if reward_model is None else rewarded(workers, reward_model, samples, micro_batch_tokens)


def said(chat: ChatFormat, prompts: List[Prompt], responses: List[Response]) -> list[Sample]:
    """Responses to prompts, with their texts."""
    pairs = zip(prompts, responses, strict=True)
    return [Sample(prompt, r.ids, chat.text(r.ids), r.ended, logprobs=r.logprobs) for prompt, r in pairs]


def own_responses(
    workers: Workers,
    loaded: LoadedModel,
    prompts: list[list[int]],
    sampling: Sampling,
    keys: list[tuple[int, ...]],
    tempered: bool = False,
    alone: bool = True,
) -> list[Response]:
    """This process's, by its own engine, ``alone`` or while another thread computes.

    Asks no other process for anything unless the model is split.
    """
    if workers.is_main and not fits_slots(loaded.model):
        _say_padded(loaded.model.config.model_type)
    with gathered(loaded.model), workers.autocast():
        return generate(
            loaded.model,
            prompts,
            sampling,
            loaded.chat.stop_ids,
            pad_id=loaded.tokenizer.pad_token_id,
            uniforms=_uniforms(keys, sampling.max_new_tokens),
            num_known=loaded.num_known,
            tempered=tempered,
            record=recorder(workers.device, alone),
        )


@cache
def _say_padded(kind: str) -> None:
    print(
        f"models of type {kind} sample batch by batch on transformers' own cache, which is slower where lengths differ"
    )


def _uniforms(keys: List[tuple[int, ...]], count: int) -> torch.Tensor:
    """(N, count) numbers in [0, 1), each row a function of its key."""
    rows = [np.random.default_rng(key).random(count) for key in keys]
    return torch.from_numpy(np.array(rows).reshape(len(keys), count))


def rewarded(workers: Workers, model: RewardModel, samples: list[Sample], micro_batch_tokens: int) -> list[Sample]:
    """Samples with the reward model's scores. Raises Diverged when one is not finite."""
    rewards = response_rewards(
        workers,
        model,
        [s.prompt.messages for s in samples],
        [s.text for s in samples],
        [s.ended for s in samples],
        context_length(model.model),
        micro_batch_tokens,
    )
    if not np.isfinite(rewards).all():
        raise Diverged("the reward model's scores are not finite")
    return [replace(sample, reward=reward) for sample, reward in zip(samples, rewards, strict=True)]

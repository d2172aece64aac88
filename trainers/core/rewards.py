"""Scores of a scalar reward model: one path for training, rollouts and evaluation.

A score is read at a sequence's true last token, known from its length. Searching the pad id instead finds the wrong
place when pad and end token are the same, and makes the score depend on the batch's other sequences.
"""

from collections.abc import Sequence as List
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch

from trainers.contract import BadInput
from trainers.core.attention import in_halves, settle
from trainers.core.batch import Batch, Packing, Sequence, collate
from trainers.core.classifiers import RewardModel, TextClassifier, text_scores
from trainers.core.compiling import uncompiled
from trainers.core.encode import joined
from trainers.core.heads import in_fp32
from trainers.core.layers import score_head
from trainers.core.models import LoadedModel
from trainers.core.parallel import Workers
from trainers.core.scoring import error_share, gathers_halves, hidden_states, probe_sequences, tolerance
from trainers.core.shares import over_ranks
from trainers.core.step import Layout, in_eval_mode, scored
from trainers.core.templates import Messages, renderer


def reward_scores(model: Any, batch: Batch) -> torch.Tensor:
    """Scores of the batch's sequences by a one-label sequence classifier: (S,) in fp32, differentiable."""
    return head_scores(model, hidden_states(model, batch), batch)


def head_scores(model: Any, hidden: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Scores from final hidden states (R * L, H): (S,) in fp32."""
    return in_fp32(score_head(model), hidden[batch.last_at]).squeeze(-1)


def response_rewards(
    workers: Workers,
    model: RewardModel,
    prompts: List[Messages],
    responses: List[str],
    ended: List[bool] | None,
    max_length: int,
    micro_batch_tokens: int = 8192,
    packing: bool = True,
) -> list[float]:
    """Rewards of responses, tokenised with the reward model's own tokenizer and chat template.

    ``prompts[i]`` are the messages that ``responses[i]`` answers; ``ended[i]`` says whether the response stopped by
    itself (None: all did). One that hit the length limit is scored without an end token, which it did not earn. All
    ranks are given all responses, share the work, and get all rewards.
    """
    if isinstance(model, TextClassifier):
        texts = [model.encoded(*pair, max_length) for pair in zip(prompts, responses, strict=True)]

        def work(mine: List[int]) -> list[float]:
            return text_scores(workers, model, [texts[i] for i in mine], micro_batch_tokens).tolist()

        return over_ranks(workers, len(texts), work)
    flags = [True] * len(responses) if ended is None else ended
    sequences = [
        reward_sequence(model, prompt, response, flag, max_length)
        for prompt, response, flag in zip(prompts, responses, flags, strict=True)
    ]
    layout = Layout[Sequence](lambda sequence: [sequence], micro_batch_tokens, packing and model.packs)

    def score(some: list[Sequence], batch: Batch) -> list[float]:
        return reward_scores(model.model, batch)[: len(some)].tolist()

    with in_eval_mode(model.model):
        return scored(workers, layout, sequences, score)


def reward_sequence(loaded: LoadedModel, prompt: Messages, response: str, ended: bool, max_length: int) -> Sequence:
    """What the reward model reads: as in training, but a response that is too long is cut, not dropped."""
    if ended and loaded.whole_turns:
        return _whole_turn(loaded, prompt, response, max_length)
    question, answer = loaded.chat.answer(prompt, response, ended)
    sequence = joined(question, answer[: max_length - 1], max_length)
    assert sequence is not None  # one token of the prompt always has room
    return sequence


def _whole_turn(loaded: LoadedModel, prompt: Messages, response: str, max_length: int) -> Sequence:
    """All that the template writes, as published reward models were trained: many read the line break behind the end."""
    text = renderer(loaded.tokenizer)([*prompt, {"role": "assistant", "content": response}], False)
    ids = np.array(loaded.tokenizer(text, add_special_tokens=False)["input_ids"][-max_length:], dtype=np.int64)
    return Sequence(ids, np.zeros(len(ids), dtype=bool))


def check_reward_scoring(loaded: LoadedModel, workers: Workers) -> None:
    """Raise BadInput unless a score is the head's product with the last token's hidden state; see below."""
    if not reads_last_token(loaded, workers):
        kind = loaded.model.config.model_type
        raise BadInput(f"reward models of type {kind} cannot be used: padded scores differ from the model's own")


@torch.no_grad()
def reads_last_token(loaded: LoadedModel, workers: Workers) -> bool:
    """Whether scores are those of the model's own forward on single sequences; and whether these can share rows.

    Sets its attention and ``loaded.packs``; see :func:`trainers.core.scoring.check_scoring` for what this guards against.
    """
    model, device = loaded.model, workers.device
    sequences = probe_sequences(model)
    # A head in fp32, as a fresh one is, takes what a backbone in bf16 gives under autocast only.
    halves = model.dtype != torch.float32 or gathers_halves(model, workers)
    with in_eval_mode(model), workers.autocast() if halves else nullcontext():
        with uncompiled():
            own = [model(input_ids=torch.from_numpy(s.ids[None]).to(device)).logits.float() for s in sequences]

        def differs(packing: Packing) -> bool:
            with workers.autocast() if in_halves(model) else nullcontext():
                scores = reward_scores(model, collate(sequences, packing, device))
            return error_share(list(scores[:, None, None]), own) > tolerance(model)

        loaded.packs = settle(model, workers, differs)
        if differs(Packing.PADDED):
            return False
    if not loaded.packs and workers.is_main:
        kind = model.config.model_type
        print(
            f"packing is off: reward models of type {kind} cannot keep sequences in one row apart, so rows are padded"
        )
    return True

"""Scores of a scalar reward model: one path for training, rollouts and evaluation.

A score is read at a sequence's true last token, known from its length. Searching the pad id instead finds the wrong
place when pad and end token are the same, and makes the score depend on the batch's other sequences.
"""

from collections.abc import Sequence as List
from typing import Any

import numpy as np
import torch

from trainers.contract import BadInput
from trainers.core.batch import Batch, Sequence, collate, plan_micro_batches
from trainers.core.classifiers import RewardModel, TextClassifier, text_scores
from trainers.core.encode import joined
from trainers.core.layers import score_head
from trainers.core.models import LoadedModel
from trainers.core.parallel import Workers
from trainers.core.scoring import error_share, hidden_states, in_fp32, probe_sequences, tolerance
from trainers.core.step import in_eval_mode
from trainers.core.templates import Messages, renderer


def reward_scores(model: Any, batch: Batch) -> torch.Tensor:
    """Scores of the batch's sequences by a one-label sequence classifier: (S,) in fp32, differentiable."""
    return head_scores(model, hidden_states(model, batch), batch)


def head_scores(model: Any, hidden: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Scores from final hidden states (R * L, H): (S,) in fp32."""
    return in_fp32(score_head(model))(hidden[batch.last_at]).squeeze(-1)


@torch.no_grad()
def score_sequences(
    workers: Workers,
    loaded: LoadedModel,
    sequences: List[Sequence],
    micro_batch_tokens: int = 8192,
    packing: bool = True,
) -> torch.Tensor:
    """Scores of this process's sequences: (S,) on the CPU in fp32, in the order given.

    Nothing is exchanged between processes, so each may bring another number of sequences, or none.
    """
    scores = torch.empty(len(sequences))
    packing = packing and loaded.packs
    was_training = loaded.model.training
    loaded.model.eval()
    for chosen in plan_micro_batches([[len(s)] for s in sequences], micro_batch_tokens, packing)[0]:
        batch = collate([sequences[i] for i in chosen], packing, workers.device)
        with workers.autocast():
            scores[chosen] = reward_scores(loaded.model, batch).cpu()
    loaded.model.train(was_training)
    return scores


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
    """Rewards of this process's responses, tokenised with the reward model's own tokenizer and chat template.

    ``prompts[i]`` are the messages that ``responses[i]`` answers; ``ended[i]`` says whether the response stopped by
    itself (None: all did). One that hit the length limit is scored without an end token, which it did not earn.
    """
    if isinstance(model, TextClassifier):
        texts = [model.encoded(*pair, max_length) for pair in zip(prompts, responses, strict=True)]
        return [float(score) for score in text_scores(workers, model, texts, micro_batch_tokens)]
    flags = [True] * len(responses) if ended is None else ended
    sequences = [
        reward_sequence(model, prompt, response, flag, max_length)
        for prompt, response, flag in zip(prompts, responses, flags, strict=True)
    ]
    return [float(s) for s in score_sequences(workers, model, sequences, micro_batch_tokens, packing)]


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

    Sets ``loaded.packs``; see :func:`trainers.core.scoring.check_scoring` for what this guards against.
    """
    model, device = loaded.model, workers.device
    sequences = probe_sequences(model)
    with in_eval_mode(model):
        own = [model(input_ids=torch.from_numpy(s.ids[None]).to(device)).logits.float() for s in sequences]

        def differs(packing: bool) -> bool:
            scores = reward_scores(model, collate(sequences, packing, device))
            return error_share(list(scores[:, None, None]), own) > tolerance(model)

        if differs(packing=False):
            return False
        loaded.packs = not differs(packing=True)
    if not loaded.packs and workers.is_main:
        kind = model.config.model_type
        print(
            f"packing is off: reward models of type {kind} cannot keep sequences in one row apart, so rows are padded"
        )
    return True

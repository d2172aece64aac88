"""Scores of a scalar reward model: one path for training, rollouts and evaluation.

A score is read at a sequence's true last token, known from its length. Searching the pad id instead finds the wrong
place when pad and end token are the same, and makes the score depend on the batch's other sequences.
"""

from collections.abc import Sequence as List
from typing import Any

import torch

from trainers.contract import BadInput
from trainers.core.batch import Batch, Sequence, collate, plan_micro_batches
from trainers.core.chat import ChatFormat
from trainers.core.encode import joined
from trainers.core.models import LoadedModel
from trainers.core.parallel import Workers
from trainers.core.reward_models import score_head
from trainers.core.scoring import error_share, hidden_states, in_eval_mode, in_fp32, probe_sequences, tolerance
from trainers.core.templates import Messages


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
    loaded: LoadedModel,
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
    flags = [True] * len(responses) if ended is None else ended
    sequences = [
        reward_sequence(loaded.chat, prompt, response, flag, max_length)
        for prompt, response, flag in zip(prompts, responses, flags, strict=True)
    ]
    return [float(s) for s in score_sequences(workers, loaded, sequences, micro_batch_tokens, packing)]


def reward_sequence(chat: ChatFormat, prompt: Messages, response: str, ended: bool, max_length: int) -> Sequence:
    """What the reward model reads: as in training, but a response that is too long is cut, not dropped."""
    question, answer = chat.answer(prompt, response, ended)
    sequence = joined(question, answer[: max_length - 1], max_length)
    assert sequence is not None  # one token of the prompt always has room
    return sequence


@torch.no_grad()
def check_reward_scoring(loaded: LoadedModel, workers: Workers) -> None:
    """Compare scores with those of the model's own forward on single sequences, and find out whether these can share rows.

    Sets ``loaded.packs``; see :func:`trainers.core.scoring.check_scoring` for what this guards against.
    """
    model, device = loaded.model, workers.device
    kind = model.config.model_type
    sequences = probe_sequences(model)
    with in_eval_mode(model):
        own = [model(input_ids=torch.from_numpy(s.ids[None]).to(device)).logits.float() for s in sequences]

        def differs(packing: bool) -> bool:
            scores = reward_scores(model, collate(sequences, packing, device))
            return error_share(list(scores[:, None, None]), own) > tolerance(model)

        if differs(packing=False):
            raise BadInput(f"reward models of type {kind} cannot be used: padded scores differ from the model's own")
        loaded.packs = not differs(packing=True)
    if not loaded.packs and workers.is_main:
        print(
            f"packing is off: reward models of type {kind} cannot keep sequences in one row apart, so rows are padded"
        )

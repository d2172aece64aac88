"""What a round of rollouts is worth: log-probabilities, values, rewards and advantages of every response token."""

from collections.abc import Sequence as List
from dataclasses import dataclass

import torch
from torch import nn

from trainers.core.batch import Batch, Packing, Sequence
from trainers.core.encode import joined
from trainers.core.heads import in_fp32
from trainers.core.layers import score_head
from trainers.core.parallel import Workers
from trainers.core.rollouts import Sample
from trainers.core.scoring import hidden_states
from trainers.core.step import Layout
from trainers.core.token_scores import TokenScores, score_tokens, token_mask
from trainers.phases.ppo.advantages import gae, token_rewards, whiten
from trainers.phases.ppo.loss import kl_estimate
from trainers.phases.ppo.spec import PpoSpec


class Critic(nn.Module):
    """A reward model read at every position: the value of a token is predicted before the token is seen."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: Batch) -> torch.Tensor:
        """Values at the batch's K scored positions: (K,) in fp32."""
        hidden = hidden_states(self.model, batch)[batch.scored_at]
        return in_fp32(score_head(self.model), hidden).squeeze(-1)


@dataclass(frozen=True)
class Experience:
    """A round, the same on all ranks. Tensors are (N, T) on the CPU in fp32, 0 where masked."""

    samples: list[Sample]
    sequences: list[Sequence]
    mask: torch.Tensor
    logprobs: torch.Tensor
    reference_logprobs: torch.Tensor
    values: torch.Tensor
    advantages: torch.Tensor
    returns: torch.Tensor
    importance: torch.Tensor | None = None
    """Weights of tokens, if others sampled them than learn from them."""

    def num_tokens(self, chosen: List[int]) -> int:
        """Tokens of some responses."""
        return sum(self.sequences[i].num_scored for i in chosen)

    def flat(self, name: str, chosen: List[int], device: torch.device) -> torch.Tensor:
        """One of the tensors for some responses, token by token as a collated batch has them: (K,)."""
        return getattr(self, name)[chosen][self.mask[chosen]].to(device)


def assess(
    spec: PpoSpec,
    workers: Workers,
    samples: list[Sample],
    kl_coef: float,
    policy: TokenScores,
    reference: TokenScores,
    critic: TokenScores,
    packing: bool | Packing,
) -> Experience:
    """Score every response token with the three models and work out advantages and returns."""
    sequences = [_sequence(sample) for sample in samples]
    layout = Layout[Sequence](lambda sequence: [sequence], spec.parallel.micro_batch_tokens, packing)
    logprobs, reference_logprobs, values = score_tokens(workers, layout, sequences, [policy, reference, critic])
    mask = token_mask(sequences)
    kl = kl_estimate(logprobs, reference_logprobs, spec.kl.estimator) * mask
    penalty = torch.tensor([0.0 if s.ended else spec.missing_eos_penalty for s in samples])
    scores = torch.tensor([s.reward for s in samples]) - penalty
    rewards = token_rewards(kl, mask, scores, kl_coef)
    if spec.whiten_rewards:
        rewards = whiten(rewards, mask, shift_mean=False)
    advantages = gae(rewards, values, mask, spec.gamma, spec.gae_lambda)
    returns = (advantages + values) * mask  # before whitening: the critic predicts rewards, not their spread
    return Experience(samples, sequences, mask, logprobs, reference_logprobs, values, whiten(advantages, mask), returns)


def _sequence(sample: Sample) -> Sequence:
    prompt = sample.prompt.ids
    sequence = joined(prompt, sample.ids, len(prompt) + len(sample.ids))
    assert sequence is not None
    return sequence

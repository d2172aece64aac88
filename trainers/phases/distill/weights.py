"""How much each response counts, from its reward.

Weights are never negative and average 1 over the step's whole batch, all processes together. A raw reward is never a
factor: times a negative one, minimising the divergence would drive the student away from the teacher without bound.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from trainers.phases.distill.spec import RewardWeighting


@dataclass(frozen=True)
class Weights:
    values: torch.Tensor
    """(N,) float64."""
    clipped: float
    """Share of responses whose weight was clipped."""

    @property
    def effective_size(self) -> float:
        """How many equally weighted responses carry as much information (Kish): from 1 to N."""
        return float(self.values.sum() ** 2 / self.values.square().sum())


def reward_weights(rewards: torch.Tensor, weighting: RewardWeighting) -> Weights:
    """Weights of N responses with these rewards: (N,) to (N,)."""
    raw, clipped = MODES[weighting.mode](rewards.double(), weighting)
    return Weights(raw / raw.mean(), clipped)


def own_sample_weights(rewards: torch.Tensor, weighting: RewardWeighting) -> Weights:
    """Weights of N samples that the student made itself.

    A trace is something to imitate, so a good one counts more. An own sample is something to correct: weighing it by
    its reward mutes the student's mistakes (docs/adr/0003: on one seed of three it then never learned to refuse).
    """
    if weighting.own_samples == "equal":
        return Weights(torch.ones(len(rewards), dtype=torch.float64), 0.0)
    return reward_weights(-rewards if weighting.own_samples == "mistakes" else rewards, weighting)


def _none(rewards: torch.Tensor, weighting: RewardWeighting) -> tuple[torch.Tensor, float]:
    return torch.ones_like(rewards), 0.0


def _exp(rewards: torch.Tensor, weighting: RewardWeighting) -> tuple[torch.Tensor, float]:
    """Exponential of the standardised reward (as in AWR, Peng et al. 2019): neither shift nor scale matters."""
    spread = rewards.std(unbiased=False)
    if spread <= 1e-8 * rewards.abs().max():  # all equal but for rounding
        return torch.ones_like(rewards), 0.0
    free = ((rewards - rewards.mean()) / spread / weighting.temperature).exp()
    clipped = free.clamp(weighting.min_weight, weighting.max_weight)
    return clipped, float((free != clipped).double().mean())


def _softmax(rewards: torch.Tensor, weighting: RewardWeighting) -> tuple[torch.Tensor, float]:
    return len(rewards) * ((rewards - rewards.max()) / weighting.temperature).softmax(0), 0.0


def _rank(rewards: torch.Tensor, weighting: RewardWeighting) -> tuple[torch.Tensor, float]:
    """Place from below, 1 to N; equal rewards share the mean of their places."""
    below = (rewards[:, None] > rewards).double().sum(-1)
    equal = (rewards[:, None] == rewards).double().sum(-1)
    return below + (equal + 1) / 2, 0.0


def _filter(rewards: torch.Tensor, weighting: RewardWeighting) -> tuple[torch.Tensor, float]:
    return (rewards >= rewards.quantile(weighting.quantile)).double(), 0.0


MODES: dict[str, Callable[[torch.Tensor, RewardWeighting], tuple[torch.Tensor, float]]] = {
    "none": _none,
    "exp": _exp,
    "softmax": _softmax,
    "rank": _rank,
    "filter": _filter,
}


def correlation(x: torch.Tensor, y: torch.Tensor) -> float:
    """Pearson's r; 0 where one of them does not vary."""
    x, y = x.double() - x.double().mean(), y.double() - y.double().mean()
    scale = float((x.square().sum() * y.square().sum()).sqrt())
    return float((x * y).sum()) / scale if scale > 0 else 0.0

"""Importance weights, for responses that were sampled by other weights, or by another program, than are trained.

An expectation over what the trained policy says, taken over what the sampler said, needs each term multiplied with
pi / mu, the probability of what was said by the policy over that by the sampler. The ratio is cut off from above (truncated
importance sampling, Ionides 2008): a token that the sampler took against all odds would else be all that is learned.

Names: N responses of at most T tokens; pi the policy before the step's first update, mu the sampler. Log-probabilities are
(N, T) and of one temperature, that of the sampling; ``mask`` is true at real tokens.
"""

from collections.abc import Sequence as List
from dataclasses import dataclass

import torch

from trainers.contract import BadInput
from trainers.core.rollouts import Sample

MAX_LOG_RATIO = 20.0
"""A larger one counts as if it were that, so one token cannot make a sum infinite."""


@dataclass(frozen=True)
class Importance:
    """Weights of tokens, and how far the policy and the sampler are apart."""

    weights: torch.Tensor | None
    """(N, T), 0 where masked; None: nothing is weighed."""
    measures: dict[str, float]
    """For the step's metrics."""


def token_importance(policy: torch.Tensor, sampler: torch.Tensor, mask: torch.Tensor, cap: float | None) -> Importance:
    """min(pi / mu, cap) of each token by itself: what a policy gradient is weighed with (Yao et al. 2025, "Your efficient
    RL framework secretly brings you off-policy RL training"). States are taken as they come: their weights are the
    products over all tokens before, which vary too much. Without a cap nothing is weighed, and all is measured.
    """
    log_ratio = _log_ratio(policy, sampler, mask)
    return _importance(log_ratio, log_ratio, mask, cap)


def prefix_importance(policy: torch.Tensor, sampler: torch.Tensor, mask: torch.Tensor, cap: float | None) -> Importance:
    """min(product of pi / mu over the tokens before, cap): of what is a function of the tokens before, and an expectation over
    the next one already, as a divergence is (per-decision importance sampling, Precup et al. 2000). 1 at the first token.
    """
    log_ratio = _log_ratio(policy, sampler, mask)
    return _importance(log_ratio, log_ratio.cumsum(1) - log_ratio, mask, cap)


def sampler_logprobs(samples: List[Sample], width: int) -> torch.Tensor:
    """What whoever made the responses said of their tokens, (N, width), 0 behind their ends. Raises BadInput if nothing."""
    found = torch.zeros(len(samples), width)
    for row, sample in zip(found, samples, strict=True):
        if sample.logprobs is None:
            raise BadInput("sampling: responses came without log-probabilities, which importance weights need")
        row[: len(sample.logprobs)] = torch.tensor(sample.logprobs)
    return found


def _log_ratio(policy: torch.Tensor, sampler: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return torch.where(mask, (policy - sampler).double().clamp(max=MAX_LOG_RATIO), 0.0)


def _importance(log_ratio: torch.Tensor, weighed: torch.Tensor, mask: torch.Tensor, cap: float | None) -> Importance:
    """``weighed``: logarithms of the weights; the mismatch is KL(mu || pi) of a token, never negative (k3, Schulman 2020)."""
    mismatch = (log_ratio.exp() - 1 - log_ratio)[mask].mean()
    if cap is None:
        return Importance(None, {"mismatch": float(mismatch)})
    free = weighed.clamp(max=MAX_LOG_RATIO).exp()
    weights = free.clamp(max=cap) * mask
    measures = {
        "mismatch": float(mismatch),
        "importance_weight": float(weights[mask].mean()),
        "importance_truncated": float((free > cap)[mask].double().mean()),
    }
    return Importance(weights.float(), measures)

"""From scores to advantages. Everything is (N, T): N responses, T response positions; ``mask`` marks real tokens."""

import torch


def token_rewards(kl: torch.Tensor, mask: torch.Tensor, scores: torch.Tensor, kl_coef: float) -> torch.Tensor:
    """-coef x KL at every token, and the response's score (N,) at its last real token: (N, T).

    Found from the mask: looking for the first pad or end token instead puts the score on padding when pad and end are
    the same token, or nowhere when a response did not end.
    """
    rewards = -kl_coef * kl * mask
    last = mask.shape[1] - 1 - mask.flip(1).long().argmax(1)
    rewards[torch.arange(len(rewards)), last] += scores
    return rewards


def gae(rewards: torch.Tensor, values: torch.Tensor, mask: torch.Tensor, gamma: float, lam: float) -> torch.Tensor:
    """Generalized advantage estimates (Schulman et al. 2016), (N, T), 0 where masked.

    Nothing follows the last token. Masked positions are stepped over, as if the tokens beside them were neighbours.
    """
    advantages = torch.zeros_like(rewards)
    next_value = next_advantage = torch.zeros_like(rewards[:, 0])
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        advantage = delta + gamma * lam * next_advantage
        advantages[:, t] = torch.where(mask[:, t], advantage, 0.0)
        next_advantage = torch.where(mask[:, t], advantage, next_advantage)
        next_value = torch.where(mask[:, t], values[:, t], next_value)
    return advantages


def whiten(x: torch.Tensor, mask: torch.Tensor, shift_mean: bool = True) -> torch.Tensor:
    """Scale to unit variance over the real tokens (unbiased), and to mean 0 if ``shift_mean``; 0 where masked.

    Fewer than two real tokens have no variance and are returned unscaled.
    """
    real = x[mask]
    if len(real) < 2:
        return x * mask
    mean = real.mean()
    whitened = (x - mean) * (real.var() + 1e-8).rsqrt()
    return (whitened if shift_mean else whitened + mean) * mask


def explained_variance(returns: torch.Tensor, values: torch.Tensor, mask: torch.Tensor) -> float:
    """1 is a perfect critic, 0 one that knows only the mean; 0 when returns do not vary."""
    target = returns[mask]
    spread = target.var(unbiased=False)
    return float(1 - (target - values[mask]).var(unbiased=False) / spread) if spread > 0 else 0.0

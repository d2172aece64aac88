"""PPO's per-token terms and its KL controller. Pure functions; reductions are the caller's."""

import torch

MAX_LOG_RATIO = 20.0
"""Beyond this a ratio is clipped anyway, and exp would overflow."""


def policy_loss(logprobs: torch.Tensor, old: torch.Tensor, advantages: torch.Tensor, clip: float) -> torch.Tensor:
    """max(-A rho, -A clip(rho, 1 - clip, 1 + clip)) of each token, rho = q / q_old (Schulman et al. 2017)."""
    ratio = (logprobs - old).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    return torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1 - clip, 1 + clip))


def clipped(logprobs: torch.Tensor, old: torch.Tensor, clip: float) -> torch.Tensor:
    """Whether each token's ratio is outside the clip range, as 0 or 1."""
    return ((logprobs - old).exp() - 1).abs().gt(clip).float()


def value_loss(values: torch.Tensor, old: torch.Tensor, returns: torch.Tensor, clip: float) -> torch.Tensor:
    """Half the larger squared error of each token's value and of the value kept within ``clip`` of the old one."""
    near = old + (values - old).clamp(-clip, clip)
    return 0.5 * torch.maximum((values - returns).square(), (near - returns).square())


def kl_estimate(logprobs: torch.Tensor, reference: torch.Tensor, estimator: str) -> torch.Tensor:
    """KL(q || reference) of each token from the sampled token alone (Schulman 2020).

    ``k1`` is unbiased and may be negative; ``k3`` is unbiased too, never negative, and varies less. A token that the
    reference finds e^20 times as likely counts as if it were that, so one token cannot make a round's sums infinite.
    """
    difference = reference - logprobs
    return -difference if estimator == "k1" else difference.clamp(max=MAX_LOG_RATIO).exp() - difference - 1


def adapted_coef(coef: float, kl: float, target: float, responses: int, horizon: int) -> float:
    """The KL coefficient after a round with ``kl`` nats per response (Ziegler et al. 2019)."""
    error = min(max(kl / target - 1, -0.2), 0.2)
    return coef * (1 + error * responses / horizon)

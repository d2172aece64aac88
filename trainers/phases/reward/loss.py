"""Losses and measures of a reward model. P pairs; everything is elementwise or a plain function of tensors."""

import torch
from torch.nn.functional import logsigmoid


def bradley_terry(chosen: torch.Tensor, rejected: torch.Tensor, margin: torch.Tensor | float = 0.0) -> torch.Tensor:
    """-log sigmoid(r_c - r_r - margin) of each pair: (P,). The margin is Llama 2's (Touvron et al. 2023)."""
    return -logsigmoid(chosen - rejected - margin)


def centering(chosen: torch.Tensor, rejected: torch.Tensor) -> torch.Tensor:
    """(r_c + r_r)^2 of each pair: (P,). Without it only differences are determined (arXiv 2312.09244, eq. 2)."""
    return (chosen + rejected) ** 2


def accuracy(chosen: torch.Tensor, rejected: torch.Tensor) -> torch.Tensor:
    """Share of pairs whose chosen response has the higher score: (). A tie is half right, as a coin would be."""
    return right(chosen - rejected).mean()


def right(difference: torch.Tensor) -> torch.Tensor:
    """1 where the better response scored higher, 0.5 for a tie, 0 elsewhere: (P,) to (P,)."""
    return torch.heaviside(difference, difference.new_tensor(0.5))


def calibration_error(chosen: torch.Tensor, rejected: torch.Tensor, bins: int = 10) -> torch.Tensor:
    """Expected calibration error of sigmoid(r_c - r_r) as the probability that the better response was found: ().

    Confidence is the winner's probability, 0.5 to 1, in equal bins; each bin's gap between mean confidence and accuracy
    counts by its share of pairs.
    """
    difference = chosen - rejected
    confidence = torch.sigmoid(difference.abs())
    which = ((confidence - 0.5) * 2 * bins).long().clamp(max=bins - 1)
    gap = torch.zeros(bins).index_add(0, which, right(difference) - confidence)
    return gap.abs().sum() / len(difference)


def length_baseline(chosen: torch.Tensor, rejected: torch.Tensor) -> torch.Tensor:
    """Accuracy of preferring the longer response, given lengths (P,): ()."""
    return accuracy(chosen.float(), rejected.float())


def correlation(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Pearson correlation of two vectors; 0 if one of them is constant: ()."""
    x, y = x.double() - x.double().mean(), y.double() - y.double().mean()
    scale = x.norm() * y.norm()
    return (x @ y / scale if scale > 0 else scale).float()

"""Losses of direct preference optimization. P pairs; everything is elementwise."""

from typing import Literal

import torch
from torch.nn.functional import logsigmoid

LossKind = Literal["sigmoid", "robust", "ipo", "hinge"]


def dpo_loss(
    chosen: torch.Tensor,
    rejected: torch.Tensor,
    lengths: torch.Tensor,
    kind: LossKind = "sigmoid",
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    length_normalize: bool | None = None,
) -> torch.Tensor:
    """Loss of each pair from log-ratios log q(y|x) - log q_ref(y|x), summed over a response's tokens: (P,).

    ``chosen`` and ``rejected`` are the log-ratios (P,), ``lengths`` the responses' token counts (P, 2).
    ``label_smoothing`` is the assumed share of flipped labels; with sigmoid this is conservative DPO.
    ``length_normalize`` divides log-ratios by lengths first; None is true for ipo alone, whose authors meant it so.
    """
    if kind == "ipo" if length_normalize is None else length_normalize:
        chosen, rejected = chosen / lengths[:, 0], rejected / lengths[:, 1]
    h = chosen - rejected
    if kind == "ipo":
        return (h - 1 / (2 * beta)) ** 2
    if kind == "hinge":
        return torch.relu(1 - beta * h)
    as_labelled, flipped = -logsigmoid(beta * h), -logsigmoid(-beta * h)
    if kind == "robust":
        return ((1 - label_smoothing) * as_labelled - label_smoothing * flipped) / (1 - 2 * label_smoothing)
    return (1 - label_smoothing) * as_labelled + label_smoothing * flipped

"""Clipping by the global norm of gradients, of which some may be split over processes."""

import math
from collections.abc import Iterable

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from trainers.core.sharding import whole


def clip(parameters: Iterable[nn.Parameter], max_norm: float) -> float:
    """Scale gradients so that their norm is at most ``max_norm``, as torch does. Returns the norm before."""
    trained = [p for p in parameters if p.grad is not None]
    # torch takes lists of one kind alone.
    kinds = [[p for p in trained if isinstance(p, DTensor) is split] for split in (False, True)]
    norms = [
        float(whole(nn.utils.get_total_norm([p.grad for p in kind if p.grad is not None]))) for kind in kinds if kind
    ]
    norm = math.sqrt(sum(n * n for n in norms))
    for kind in kinds:
        nn.utils.clip_grads_with_norm_(kind, max_norm, torch.tensor(norm))
    return norm

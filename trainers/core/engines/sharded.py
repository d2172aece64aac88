"""Weights, gradients and moments split over processes by FSDP2 (:mod:`trainers.core.sharding`)."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from trainers.core.adamw import adamw
from trainers.core.engines.local_state import LocalState
from trainers.core.engines.norms import clip
from trainers.core.parallel import Workers
from trainers.core.sharding import release
from trainers.spec import Optim


class Sharded(LocalState):
    """Every pass's gradients are reduced to their shards at once, so no process ever holds whole ones.

    Trained parameters that are not split, such as adapters, are the same everywhere; their gradients are averaged once a step.
    """

    def __init__(self, workers: Workers, module: nn.Module, optim: Optim) -> None:
        release(module)
        super().__init__(module, adamw(module, optim))
        self.workers = workers
        self.max_grad_norm = optim.max_grad_norm
        self.module = module

    @contextmanager
    def exchange(self, last: bool) -> Iterator[None]:
        """Between replicas of a hybrid mesh, gradients wait for the last pass."""
        for module in self.module.modules():
            if isinstance(module, FSDPModule):
                module.set_requires_all_reduce(last, recurse=False)
        yield

    def backward(self, loss: torch.Tensor) -> None:
        """FSDP averages over processes, so the sum is restored by multiplying with their number."""
        (loss * self.workers.world).backward()

    def step(self, lr: float) -> float:
        self._average_replicated()
        return self.update(lr, clip(self.parameters, self.max_grad_norm))

    def _average_replicated(self) -> None:
        gradients = [p.grad for p in self.parameters if p.grad is not None and not isinstance(p, DTensor)]
        if not gradients or self.workers.world == 1:
            return
        flat = torch.cat([g.float().flatten() for g in gradients])
        flat = self.workers.sum(flat) / self.workers.world
        for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(part.view_as(gradient))

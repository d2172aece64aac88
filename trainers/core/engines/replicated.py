"""Whole weights in every process: one process alone, or data parallelism by DDP."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import nn

from trainers.contract import BadInput
from trainers.core.adamw import adamw
from trainers.core.engines.local_state import LocalState
from trainers.core.engines.norms import clip
from trainers.core.engines.reach import Reach, listed
from trainers.core.parallel import Workers
from trainers.spec import Optim


class Replicated(LocalState):
    """DDP averages gradients over processes in the last of a step's passes."""

    def __init__(self, workers: Workers, module: nn.Module, optim: Optim) -> None:
        super().__init__(module, adamw(module, optim))
        self.world = workers.world
        self.reach = Reach(workers, self.named if workers.world > 1 else {})
        self.max_grad_norm = optim.max_grad_norm
        self.module = workers.wrap(module)
        self.no_sync = getattr(self.module, "no_sync", nullcontext)

    @contextmanager
    def exchange(self, last: bool) -> Iterator[None]:
        """DDP decides in the forward pass whether the backward pass that follows will exchange."""
        with nullcontext() if last else self.no_sync():
            yield

    def backward(self, loss: torch.Tensor) -> None:
        """The sum over processes is restored from the mean by multiplying with their number."""
        (loss * self.world).backward()

    def step(self, lr: float) -> float:
        """Raises BadInput for weights without gradients: DDP exchanges none of those that are sent along with them."""
        if missed := self.reach.missed():
            raise BadInput(
                f"parallel.strategy ddp: {listed(missed)} get no gradient: set strategy fsdp, or one process"
            )
        return self.update(lr, clip(self.parameters, self.max_grad_norm))

"""The state of training where torch's optimizer holds it: whole tensors, or DTensors."""

import math
from collections.abc import Collection, Iterator, Mapping

import torch
from torch import nn

from trainers.core.adamw import fresh_state
from trainers.core.engines.engine import STEP, WEIGHTS, Fill


class LocalState:
    """Half an engine: see :class:`trainers.core.engines.engine.Engine` for what its methods promise."""

    def __init__(self, module: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.named = {name: p for name, p in module.named_parameters() if p.requires_grad}
        self.parameters = list(self.named.values())
        self.optimizer = optimizer

    def update(self, lr: float, norm: float) -> float:
        """Take an optimizer step, unless the gradients' norm is not finite, and clear them. Returns the norm."""
        if math.isfinite(norm):
            for group in self.optimizer.param_groups:
                group["lr"] = lr
            self.optimizer.step()
        self.discard_gradients()
        return norm

    def discard_gradients(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)

    def shapes(self) -> Mapping[str, torch.Size]:
        return {name: p.shape for name, p in self.named.items()}

    def saved(self, moments: bool = True) -> Iterator[tuple[str, torch.Tensor]]:
        for name, parameter in self.named.items():
            yield f"{WEIGHTS}/{name}", parameter.detach()
            if moments:
                state = self.optimizer.state.get(parameter, {})
                yield from ((f"{kind}/{name}", tensor) for kind, tensor in state.items())

    def restore(self, fill: Fill, names: Collection[str]) -> None:
        for name, parameter in self.named.items():
            targets = {f"{WEIGHTS}/{name}": parameter.detach()}
            if f"{STEP}/{name}" in names:
                state = self.optimizer.state[parameter] = fresh_state(self.optimizer, parameter)
                targets |= {f"{kind}/{name}": tensor for kind, tensor in state.items()}
            fill(targets)

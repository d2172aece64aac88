"""The interface of all strategies."""

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Protocol

import torch
from torch import nn

WEIGHTS, STEP = "weights", "step"

Fill = Callable[[dict[str, torch.Tensor]], None]
"""Fills tensors, in place, with what was saved by their names."""


class Engine(Protocol):
    """A module in training.

    The state of training has names that all strategies share, so what one has saved any other can go on from:
    ``weights/PARAMETER``, ``exp_avg/PARAMETER``, ``exp_avg_sq/PARAMETER`` and ``step/PARAMETER`` (the number of
    updates), of trained parameters by their names in the module. One that never had a gradient has only weights.
    """

    module: nn.Module
    """To be called for forward passes."""
    parameters: list[nn.Parameter]
    """Those that are trained, as this process holds them."""

    def exchange(self, last: bool) -> AbstractContextManager[None]:
        """Around forward *and* backward of one of a step's passes, of which this may be the ``last``."""
        ...

    def backward(self, loss: torch.Tensor) -> None:
        """Add one pass's gradients. ``loss`` is this process's part of a sum over all processes and passes."""
        ...

    def step(self, lr: float) -> float:
        """Clip, update and clear. Returns the global norm of the gradients before; if it is not finite nothing is updated."""
        ...

    def discard_gradients(self) -> None:
        """Take the step's gradients back instead of updating."""
        ...

    def shapes(self) -> Mapping[str, torch.Size]:
        """Whole shapes of the trained parameters, by name."""
        ...

    def saved(self, moments: bool = True) -> Iterator[tuple[str, torch.Tensor]]:
        """The state of training, one tensor after the other, on all processes alike.

        A DTensor is this process's shard; a plain tensor is whole, the same in all processes.
        """
        ...

    def restore(self, fill: Fill, names: Collection[str]) -> None:
        """Take on a saved state, of which ``names`` says what there is, perhaps only weights. All processes take part."""
        ...

"""A rank among others that are not there."""

from contextlib import contextmanager, nullcontext

import torch


class OneRank:
    """As much of :class:`Workers` as computing takes. What it would send stays with it."""

    def __init__(self, rank: int = 0, world: int = 1, bf16: bool = False) -> None:
        self.rank, self.world, self.bf16, self.device = rank, world, bf16, torch.device("cpu")
        self.is_main = rank == 0
        self.attention = "auto"
        self.last: list[bool] = []
        """Of each pass, whether gradients would have been exchanged."""

        self.trained_sharding = self.frozen_sharding = self.zero = None

    def autocast(self):
        return torch.autocast("cpu", torch.bfloat16) if self.bf16 else nullcontext()

    @contextmanager
    def exchange(self, last):
        self.last.append(last)
        yield

    def backward(self, loss):
        loss.backward()

    def sum(self, value):
        return value

    def gather_objects(self, items):
        return items

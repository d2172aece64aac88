"""A module with its optimizer: the part of a training step that is the same in every phase."""

import math
from collections.abc import Mapping

import torch
from torch import nn

from trainers.contract import Diverged
from trainers.core.adamw import MOMENTS
from trainers.core.engines.engine import STEP, WEIGHTS, Engine
from trainers.core.engines.replicated import Replicated
from trainers.core.engines.sharded import Sharded
from trainers.core.engines.zero import Zero
from trainers.core.flops import ModelFlops
from trainers.core.parallel import Workers
from trainers.core.sharding import is_split, release
from trainers.spec import Optim


def learning_rate(step: int, total_steps: int, optim: Optim) -> float:
    """Learning rate of the step with this index (from 0): linear warm-up, then the schedule down to its floor."""
    warmup = math.ceil(optim.warmup_ratio * total_steps)
    if step < warmup:
        return optim.lr * (step + 1) / warmup
    if optim.schedule == "constant":
        return optim.lr
    done = (step - warmup) / max(1, total_steps - warmup)
    shape = 1 - done if optim.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * done))
    return optim.lr * (optim.min_lr_ratio + (1 - optim.min_lr_ratio) * shape)


class Trainee:
    """A module in training and its schedule. The learning rate is a function of the step, not a state."""

    def __init__(self, workers: Workers, module: nn.Module, optim: Optim, total_steps: int, flops: ModelFlops) -> None:
        self.flops = flops
        self.optim = optim
        self.total_steps = total_steps
        self.engine = engine_for(workers, module, optim)
        self.module = self.engine.module

    def update(self, step: int) -> dict[str, float]:
        """Clip, take an optimizer step, clear gradients. Raises Diverged when the gradient is not finite."""
        lr = learning_rate(step, self.total_steps, self.optim)
        norm = self.engine.step(lr)
        if not math.isfinite(norm):
            raise Diverged(f"step {step + 1}: the gradient norm is {norm}; try a lower optim.lr than {self.optim.lr:g}")
        return {"grad_norm": norm, "learning_rate": lr}

    @property
    def moment_bytes(self) -> int:
        """Of one number of one moment."""
        return 2 if self.optim.state_dtype == "bf16" else 4

    def check_saved(self, shapes: Mapping[str, torch.Size]) -> None:
        """Raise ValueError unless a saved state, by names and shapes, is one of such a model's training.

        A parameter without gradients has no moments; without any moments it is a state of weights alone.
        """
        own = self.engine.shapes()
        wanted = {f"{WEIGHTS}/{name}": shape for name, shape in own.items()}
        stepped = [name for name in own if f"{STEP}/{name}" in shapes]
        wanted |= {f"{STEP}/{name}": torch.Size([]) for name in stepped}
        wanted |= {f"{moment}/{name}": own[name] for name in stepped for moment in MOMENTS}
        for name in sorted(wanted.keys() | shapes.keys()):
            if name not in shapes:
                raise ValueError(f"{name} is missing")
            if name not in wanted:
                raise ValueError(f"{name} belongs to another model")
            if shapes[name] != wanted[name]:
                raise ValueError(f"{name} has shape {list(shapes[name])}, the model's has {list(wanted[name])}")


def engine_for(workers: Workers, module: nn.Module, optim: Optim) -> Engine:
    """What the phase's strategy makes of a module."""
    if workers.zero is not None:
        return Zero(workers, module, optim, workers.zero)
    release(module)  # gathered weights that are kept for a backward pass do not look split
    return Sharded(workers, module, optim) if is_split(module) else Replicated(workers, module, optim)


def seed_step(seed: int, step: int, rank: int) -> None:
    """Make everything random in a step (dropout) a function of (seed, step, rank), so a resumed run repeats it."""
    mixed = int(torch.tensor([seed, step, rank]).mul(torch.tensor([1_000_003, 10_007, 101])).sum())
    torch.manual_seed(mixed % 2**63)

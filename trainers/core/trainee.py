"""A module with its optimizer: the part of a training step that is the same in every phase."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from trainers.contract import Diverged
from trainers.core.adamw import MOMENTS, RoundingAdamW
from trainers.core.flops import ModelFlops
from trainers.core.parallel import Workers
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
    """A wrapped module, AdamW, clipping and the schedule. The learning rate is a function of the step, not a state."""

    def __init__(self, workers: Workers, module: nn.Module, optim: Optim, total_steps: int, flops: ModelFlops) -> None:
        self.workers = workers
        self.flops = flops
        self.optim = optim
        self.total_steps = total_steps
        self.module = workers.wrap(module)
        self.parameters = [p for p in module.parameters() if p.requires_grad]
        self.optimizer = _adamw(module, optim)

    def update(self, step: int) -> dict[str, float]:
        """Clip, take an optimizer step, clear gradients. Raises Diverged when the gradient is not finite."""
        norm = float(nn.utils.clip_grad_norm_(self.parameters, self.optim.max_grad_norm))
        if not math.isfinite(norm):
            raise Diverged(f"step {step + 1}: the gradient norm is {norm}; try a lower optim.lr than {self.optim.lr:g}")
        lr = learning_rate(step, self.total_steps, self.optim)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.discard_gradients()
        return {"grad_norm": norm, "learning_rate": lr}

    @property
    def moment_bytes(self) -> int:
        """Of one number of one moment."""
        return 2 if self.optim.state_dtype == "bf16" else 4

    def discard_gradients(self) -> None:
        """Take the step's gradients back instead of updating."""
        self.optimizer.zero_grad(set_to_none=True)

    def trained_weights(self) -> dict[str, torch.Tensor]:
        """Trained parameters by name; with adapters only these."""
        module = self.workers.plain(self.module)
        return {name: p.detach() for name, p in module.named_parameters() if p.requires_grad}

    def load_weights(self, weights: Mapping[str, torch.Tensor]) -> None:
        """Copy trained parameters back, in place. Raises ValueError, and copies nothing, if they are not this model's."""
        self.check_weights(weights)
        for name, parameter in self.trained_weights().items():
            parameter.copy_(weights[name])

    def check_weights(self, weights: Mapping[str, torch.Tensor]) -> None:
        """Raise ValueError unless these are the trained parameters of such a model."""
        _check_same({name: p.shape for name, p in self.trained_weights().items()}, weights)

    def optimizer_state(self) -> dict[str, torch.Tensor]:
        """Moments and step counts as ``NUMBER.NAME``, where parameters are numbered as the optimizer does."""
        state = self.optimizer.state_dict()["state"]
        return {f"{i}.{name}": tensor for i, found in state.items() for name, tensor in found.items()}

    def load_optimizer_state(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Raises ValueError, and changes nothing, if they are not this optimizer's."""
        self.check_optimizer_state(tensors)
        state: dict[int, dict[str, torch.Tensor]] = {}
        for key, tensor in tensors.items():
            index, name = key.split(".")
            state.setdefault(int(index), {})[name] = tensor
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": state, "param_groups": groups})

    def check_optimizer_state(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Raise ValueError unless this is the state of such an optimizer; a parameter without gradients has none."""
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        known = {str(i) for i in range(len(parameters))}
        stepped = {key.partition(".")[0] for key in tensors} & known
        shapes = {f"{i}.step": torch.Size([]) for i in stepped}
        shapes |= {f"{i}.{name}": parameters[int(i)].shape for i in stepped for name in MOMENTS}
        _check_same(shapes, tensors)


def _check_same(shapes: Mapping[str, torch.Size], tensors: Mapping[str, torch.Tensor]) -> None:
    for name in sorted(shapes.keys() | tensors.keys()):
        if name not in tensors:
            raise ValueError(f"{name} is missing")
        if name not in shapes:
            raise ValueError(f"{name} belongs to another model")
        if tensors[name].shape != shapes[name]:
            raise ValueError(f"{name} has shape {list(tensors[name].shape)}, the model's has {list(shapes[name])}")


def _adamw(module: nn.Module, optim: Optim) -> torch.optim.Optimizer:
    """torch's, where weights and moments are fp32."""
    groups = _decay_groups(module, optim.weight_decay)
    trained = [p for group in groups for p in group["params"]]
    if optim.state_dtype == "bf16" or any(p.dtype != torch.float32 for p in trained):
        return RoundingAdamW(groups, optim, torch.bfloat16 if optim.state_dtype == "bf16" else torch.float32)
    fused = any(p.is_cuda for p in trained)
    return torch.optim.AdamW(groups, lr=optim.lr, betas=(optim.beta1, optim.beta2), eps=optim.eps, fused=fused)


def _decay_groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Matrices decay; biases and norm scales (fewer than two dimensions) do not."""
    trained = [p for p in module.parameters() if p.requires_grad]
    return [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]


def seed_step(seed: int, step: int, rank: int) -> None:
    """Make everything random in a step (dropout) a function of (seed, step, rank), so a resumed run repeats it."""
    mixed = int(torch.tensor([seed, step, rank]).mul(torch.tensor([1_000_003, 10_007, 101])).sum())
    torch.manual_seed(mixed % 2**63)

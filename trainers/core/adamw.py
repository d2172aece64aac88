"""AdamW for weights or moments that are held in bf16.

torch's keeps moments in the weights' type and rounds to the nearest: a bf16 weight of 0.02 has neighbours 1e-4 away, so
steps of 1e-6 never move it, and a second moment with beta 0.999 never falls. Here every tensor is worked out in fp32, one
at a time, and rounded at random to one of its two neighbours, the likelier the nearer, so the mean is what was computed
(Zamirai et al. 2020, arXiv:2010.06192).
"""

import math
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from trainers.core.sharding import whole_shape
from trainers.spec import Optim

MOMENTS = ("exp_avg", "exp_avg_sq")
PIECE_ELEMENTS = {"cpu": 2**18}
PIECE_ON_DEVICES = 2**22
"""Numbers of a weight that are worked out at once, in some eight tensors of fp32. A processor's caches hold 1 MiB of each:
pieces of 2**24 took 11 times as long, most of it for fresh pages. Devices need enough to be busy with; 128 MiB are that.
"""


def adamw(module: nn.Module, optim: Optim) -> torch.optim.Optimizer:
    """For a module's trained parameters: torch's, where weights and moments are fp32."""
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
        {"params": [p for p in trained if len(whole_shape(p)) >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trained if len(whole_shape(p)) < 2], "weight_decay": 0.0},
    ]


def fresh_state(optimizer: torch.optim.Optimizer, weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """State of a weight that was never updated, as the optimizer would make it."""
    on_device = bool(optimizer.param_groups[0].get("fused"))
    step = torch.zeros((), device=weight.device) if on_device else torch.tensor(0.0)
    dtype = getattr(optimizer, "moments", weight.dtype)
    return {"step": step, **{name: torch.zeros_like(weight, dtype=dtype) for name in MOMENTS}}


class RoundingAdamW(torch.optim.Optimizer):
    """Decoupled weight decay (Loshchilov and Hutter 2019). What is random is a function of step and place alone.

    So processes that hold the same weights round the same way, however weights are split over them, and a resumed run
    repeats it.
    """

    def __init__(self, groups: list[dict[str, Any]], optim: Optim, moments: torch.dtype) -> None:
        super().__init__(groups, {"lr": optim.lr, "betas": (optim.beta1, optim.beta2), "eps": optim.eps})
        self.moments = moments

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        weights = [(weight, group) for group in self.param_groups for weight in group["params"]]
        for number, (weight, group) in enumerate(weights):
            if weight.grad is None:
                continue
            if not self.state[weight]:
                self.state[weight] = fresh_state(self, weight)
            self.state[weight]["step"] += 1
            _update_by_rows(weight, self.state[weight], group, number)


def _update_by_rows(weight: torch.Tensor, state: dict[str, torch.Tensor], group: dict[str, Any], number: int) -> None:
    """Some rows after the others: what is worked out in fp32 is several times as large as the weight, which may be a
    model's part in one piece (ZeRO's are).
    """
    parts = [_part(tensor) for tensor in (weight, weight.grad, state["exp_avg"], state["exp_avg_sq"])]
    rows, start = parts[0].shape[0] if parts[0].ndim else 1, _start(weight)
    width = parts[0].numel() // max(rows, 1)
    size = max(1, PIECE_ELEMENTS.get(weight.device.type, PIECE_ON_DEVICES) // max(width, 1))
    for first in range(0, rows, size):
        held, grad, average, square = (part[first : first + size] if part.ndim else part for part in parts)
        _update(held, grad, average, square, start + first * width, int(state["step"]), group, number)


def _update(
    held: torch.Tensor,
    grad: torch.Tensor,
    average: torch.Tensor,
    square: torch.Tensor,
    start: int,
    step: int,
    group: dict[str, Any],
    number: int,
) -> None:
    """Rows of a weight in place, of which the first element is at ``start``."""
    beta1, beta2 = group["betas"]
    grad, exact = grad.float(), held.float()
    first = average.float().lerp_(grad, 1 - beta1)
    second = square.float().mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    divisor = (second.sqrt() / math.sqrt(1 - beta2**step)).add_(group["eps"])
    exact.mul_(1 - group["lr"] * group["weight_decay"])
    exact.addcdiv_(first, divisor, value=-group["lr"] / (1 - beta1**step))
    for kind, (target, value) in enumerate(((held, exact), (average, first), (square, second))):
        target.copy_(value if target.dtype == torch.float32 else rounded(value, (step, number, kind), start))


def _part(tensor: Any) -> torch.Tensor:
    """What this process holds of it."""
    part: torch.Tensor = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return part


def _start(weight: torch.Tensor) -> int:
    """Place of this process's first element in the whole tensor, which is split along rows."""
    if not isinstance(weight, DTensor):
        return 0
    _, offset = compute_local_shape_and_global_offset(weight.shape, weight.device_mesh, weight.placements)
    return int(offset[0]) * (weight.numel() // max(weight.shape[0], 1))


def rounded(value: torch.Tensor, key: tuple[int, ...], start: int = 0) -> torch.Tensor:
    """fp32 to bf16, to one of the two neighbours at random so that the mean is ``value``.

    A bf16 number is the upper half of an fp32 number's bits: noise below the cut carries over as often as it should.
    ``start`` is the place of the first element in the tensor that ``value`` is a part of.
    """
    noise = _noise(value, key, start)
    return ((value.view(torch.int32) + noise) & -(2**16)).view(torch.float32).bfloat16()


def _noise(value: torch.Tensor, key: tuple[int, ...], start: int) -> torch.Tensor:
    """16 random bits for each element, by hashing its place with the key."""
    place = torch.arange(start, start + value.numel(), device=value.device).to(torch.int32)  # wraps around
    bits = place.mul_(_signed(0x9E3779B1))
    for part in key:
        bits = _mixed(bits.bitwise_xor_(_signed(part * 0x85EBCA77 + 0x165667B1)))
    return bits.bitwise_and_(0xFFFF).view(value.shape)


def _mixed(bits: torch.Tensor) -> torch.Tensor:
    """A permutation of 32-bit numbers that spreads every bit over all: two rounds of xor-shift and multiply."""
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        bits ^= (bits >> shift) & (2 ** (32 - shift) - 1)  # without the sign's copies
        bits *= _signed(factor)
    bits ^= (bits >> 16) & 0xFFFF
    return bits


def _signed(number: int) -> int:
    """The lower 32 bits, read as a signed number."""
    return (number + 2**31) % 2**32 - 2**31

"""Products with weights on a processor in fp32, by oneDNN where MKL, to which torch leaves them, is slow.

MKL uses a half of what processors with AVX-512 by others than Intel can do. All passes over a model multiply by the same
function, with gradients or without, so that what a policy is scored with is what it is trained with (docs/adr/0027).

Names: N rows, I and O width of what comes in and goes out.
"""

from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from trainers.sizing.at_once import BLOCK

FEWEST = 2**21
"""Multiplications of a product for which it pays: oneDNN takes ten microseconds to be called, MKL one."""
STEPS = 8
"""Numbers of rows between one power of two and the next. oneDNN makes a program for each shape, in milliseconds, and keeps
a thousand of them, of a megabyte and more: with rows up to the next such number there are few."""


class Linear(nn.Linear):
    """A linear layer that multiplies so, where it pays."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # noqa: A002 - as torch's is called
        """(..., I) to (..., O)."""
        return linear(input, self.weight, self.bias)


def hasten(model: nn.Module) -> None:
    """Let a model's plain linear layers multiply so: none that is packed in bits, split over processes, or of its own kind."""
    if not mkl_is_slow():
        return
    for module in model.modules():
        if type(module) is nn.Linear and type(module.weight) is nn.Parameter:
            module.__class__ = Linear


def linear(inputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """``torch.nn.functional.linear``: (..., I) and (O, I) to (..., O)."""
    if not (weight.dtype == torch.float32 and _pays(inputs, len(weight))):
        return nn.functional.linear(inputs, weight, bias)
    found: torch.Tensor = _Linear.apply(inputs, weight, bias)
    return found


def product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """``left @ right`` of matrices, without gradients."""
    return _times(left, right.T) if _pays(left, right.shape[1]) else left @ right


def add_gradient(total: torch.Tensor, slope: torch.Tensor, inputs: torch.Tensor) -> None:
    """Add a weight's gradient to others, (O, I) in place, from that of its product, (N, O), and what came in, (N, I)."""
    if not _pays(slope, inputs.shape[1]):
        total.addmm_(slope.T, inputs)
        return
    for some, part in zip(total.split(BLOCK), slope.split(BLOCK, dim=1), strict=True):
        some.add_(_gradient(part, inputs))


@cache
def mkl_is_slow() -> bool:
    """Whether torch has both, and this processor has AVX-512 and is not Intel's.

    oneDNN's operations are torch's own compiler's, so a version may lack them.
    """
    both = torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()
    return both and hasattr(torch.ops.mkldnn, "_linear_pointwise") and _is_wide() and not _is_intels()


def _is_wide() -> bool:
    return torch.backends.cpu.get_cpu_capability() == "AVX512"


def _is_intels() -> bool:
    processor = Path("/proc/cpuinfo")
    return not processor.is_file() or "GenuineIntel" in processor.read_text()


def _pays(inputs: torch.Tensor, width: int) -> bool:
    large = inputs.ndim > 1 and inputs.numel() * width >= FEWEST
    plain = large and inputs.dtype == torch.float32 and inputs.device.type == "cpu"
    return plain and mkl_is_slow() and not torch.is_autocast_enabled("cpu")


class _Linear(torch.autograd.Function):
    """Keeps what torch's own would: what came into a layer with frozen weights is not."""

    @staticmethod
    def forward(ctx: Any, inputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        wants_inputs, wants_weight, _ = ctx.needs_input_grad
        ctx.save_for_backward(inputs if wants_weight else None, weight if wants_inputs else None)
        return _times(inputs, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        inputs, weight = ctx.saved_tensors
        slope = grads[0].flatten(0, -2)
        return (
            None if weight is None else _times(grads[0], weight.T),
            None if inputs is None else _gradient(slope, inputs.flatten(0, -2)),
            slope.sum(0) if ctx.needs_input_grad[2] else None,
        )


def _times(inputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """(..., I) and (O, I) to (..., O)."""
    found = _by_onednn(filled(inputs.flatten(0, -2)), weight, bias)
    return found.resize_(*inputs.shape[:-1], len(weight))


def _gradient(slope: torch.Tensor, inputs: torch.Tensor) -> torch.Tensor:
    """(N, O) and (N, I) to (O, I)."""
    return _by_onednn(filled(slope).T, filled(inputs).T)


def filled(rows: torch.Tensor) -> torch.Tensor:
    """With rows of zeros up to the next number of rows that there is a program for."""
    missing = -len(rows) % step(len(rows))
    return nn.functional.pad(rows, (0, 0, 0, missing)) if missing else rows


def step(count: int) -> int:
    return max(1, 2 ** (count.bit_length() - 1) // STEPS)


def _by_onednn(inputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    found: torch.Tensor = torch.ops.mkldnn._linear_pointwise.default(inputs, weight, bias, "none", [], "")
    return found

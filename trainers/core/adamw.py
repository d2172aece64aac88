"""AdamW for weights or moments that are held in bf16.

torch's keeps moments in the weights' type and rounds to the nearest: a bf16 weight of 0.02 has neighbours 1e-4 away, so
steps of 1e-6 never move it, and a second moment with beta 0.999 never falls. Here every tensor is worked out in fp32, one
at a time, and rounded at random to one of its two neighbours, the likelier the nearer, so the mean is what was computed
(Zamirai et al. 2020, arXiv:2010.06192).
"""

import math
from typing import Any

import torch

from trainers.spec import Optim

MOMENTS = ("exp_avg", "exp_avg_sq")


class RoundingAdamW(torch.optim.Optimizer):
    """Decoupled weight decay (Loshchilov and Hutter 2019). What is random is a function of the step's number alone.

    So ranks that hold the same weights round the same way, and a resumed run repeats it.
    """

    def __init__(self, groups: list[dict[str, Any]], optim: Optim, moments: torch.dtype) -> None:
        super().__init__(groups, {"lr": optim.lr, "betas": (optim.beta1, optim.beta2), "eps": optim.eps})
        self.moments = moments

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        generator: torch.Generator | None = None
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                state = self.state[weight] or self._fresh(weight)
                state["step"] += 1
                if generator is None:
                    generator = torch.Generator(weight.device).manual_seed(int(state["step"]))
                _update(weight, state, group, generator)

    def _fresh(self, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        zeros = {name: torch.zeros_like(weight, dtype=self.moments) for name in MOMENTS}
        self.state[weight] = {"step": torch.tensor(0.0), **zeros}
        return self.state[weight]

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch does, which turns moments into the weights' type: that is taken back."""
        super().load_state_dict(state_dict)
        weights = [weight for group in self.param_groups for weight in group["params"]]
        for index, saved in state_dict["state"].items():
            for name in MOMENTS:
                self.state[weights[index]][name] = saved[name].to(weights[index].device, self.moments, copy=True)


def _update(weight: torch.Tensor, state: dict[str, torch.Tensor], group: dict[str, Any], rng: torch.Generator) -> None:
    beta1, beta2 = group["betas"]
    step = float(state["step"])
    grad, exact = weight.grad.float(), weight.float()  # type: ignore[union-attr]
    first = state["exp_avg"].float().lerp_(grad, 1 - beta1)
    second = state["exp_avg_sq"].float().mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    divisor = (second.sqrt() / math.sqrt(1 - beta2**step)).add_(group["eps"])
    exact.mul_(1 - group["lr"] * group["weight_decay"])
    exact.addcdiv_(first, divisor, value=-group["lr"] / (1 - beta1**step))
    for target, value in ((weight, exact), (state["exp_avg"], first), (state["exp_avg_sq"], second)):
        target.copy_(value if target.dtype == torch.float32 else rounded(value, rng))


def rounded(value: torch.Tensor, rng: torch.Generator) -> torch.Tensor:
    """fp32 to bf16, to one of the two neighbours at random so that the mean is ``value``.

    A bf16 number is the upper half of an fp32 number's bits: noise below the cut carries over as often as it should.
    """
    noise = torch.randint(2**16, value.shape, generator=rng, device=value.device, dtype=torch.int32)
    return ((value.view(torch.int32) + noise) & -(2**16)).view(torch.float32).bfloat16()

"""DeepSpeed's ZeRO: moments (stage 1), gradients too (2) and weights too (3) are split over processes."""

import math
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from trainers.contract import BadInput
from trainers.core.adamw import adamw
from trainers.core.engines.engine import Fill
from trainers.core.engines.reach import Reach, listed
from trainers.core.engines.zero_state import ZeroState
from trainers.core.engines.zero_weights import hand_over
from trainers.core.layers import kept_in_fp32
from trainers.core.parallel import Workers
from trainers.core.presence import be_patient
from trainers.core.sharding import is_split, whole_shape
from trainers.spec import Optim

BUCKET_ELEMENTS = 5 * 10**8
"""DeepSpeed's own size of a bucket of gradients."""


class Zero:
    """DeepSpeed's engine. Its own count of passes and examples is of no use here: our passes say which is the last."""

    def __init__(self, workers: Workers, module: nn.Module, optim: Optim, config: dict[str, Any]) -> None:
        import deepspeed

        self.rank, self.world = workers.rank, workers.world
        config = _with_types(config, module) | {"gradient_clipping": optim.max_grad_norm}
        if is_split(module):
            hand_over(module, config)
        named = {name: p for name, p in module.named_parameters() if p.requires_grad}
        shapes = {name: whole_shape(p) for name, p in named.items()}
        self.optimizer = adamw(module, optim)
        self.weight_decay = optim.weight_decay
        self.reach = Reach(workers, named)
        config |= {"zero_optimization": _with_bucket(config["zero_optimization"], shapes)}
        self.module, *_ = deepspeed.initialize(
            model=module, optimizer=self.optimizer, config=config, dist_init_required=False
        )
        if "offload_optimizer" in config["zero_optimization"]:
            # Gradients are looked at themselves: their norms were taken before :meth:`discard_gradients` marks one.
            self.module.optimizer.check_grad_overflow = True
        be_patient(self.module.seq_data_parallel_group)
        self.parameters = list(named.values())
        self.state = ZeroState(workers, self.module, self.optimizer, named, shapes)
        self.has_gradients = False

    @contextmanager
    def exchange(self, last: bool) -> Iterator[None]:
        self.module.set_gradient_accumulation_boundary(last)
        yield

    def backward(self, loss: torch.Tensor) -> None:
        """ZeRO averages over processes, so the sum is restored by multiplying with their number."""
        self.module.backward(loss * self.world, scale_wrt_gas=False)
        self.has_gradients = True

    def step(self, lr: float) -> float:
        """Raises BadInput for weights without gradients that would decay: ZeRO's are parts of one long vector."""
        decaying = [name for name in self.reach.missed() if self.weight_decay and len(self.state.shapes[name]) > 1]
        if decaying:
            raise BadInput(
                f"optim.weightDecay {self.weight_decay:g}: strategy deepspeed lets weights decay that get no gradient "
                f"({listed(decaying)}): set 0, or strategy fsdp"
            )
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.module.step()
        self.has_gradients = False
        norm = float(self.module.get_global_grad_norm())
        return norm if norm >= 0 else math.nan

    def discard_gradients(self) -> None:
        """DeepSpeed drops gradients, wherever they have got to, when one is no number: so the first is made to be none."""
        from deepspeed.utils import safe_set_full_grad, safe_set_local_grad

        if not self.has_gradients:
            return
        first: Any = self.parameters[0]  # a step that reaches any weight reaches it: embeddings, or the lowest adapter
        split = self.state.stage == 3
        value = torch.zeros_like(first.ds_tensor if split else first)
        if self.rank == 0:  # whose part begins with a number of the weight, where others may have padding alone
            value.view(-1)[0] = math.nan
        (safe_set_local_grad if split else safe_set_full_grad)(first, value)
        self.module.step()
        self.has_gradients = False

    def shapes(self) -> Mapping[str, torch.Size]:
        return self.state.shapes

    def saved(self, moments: bool = True) -> Iterator[tuple[str, torch.Tensor]]:
        return self.state.saved(moments)

    def restore(self, fill: Fill, names: Collection[str]) -> None:
        self.state.restore(fill, names)


def _with_types(config: dict[str, Any], module: nn.Module) -> dict[str, Any]:
    """Weights in bf16 get fp32 copies, split over processes, which are what is updated.

    All that is trained is one long vector, of one type then. Raises BadInput where an architecture wants two.
    """
    trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
    if all(p.dtype != torch.bfloat16 for p in trained.values()):
        return config
    if kept := [name for name, p in trained.items() if p.dtype != torch.bfloat16 and _keeps_in_fp32(module, name)]:
        raise BadInput(
            f"dtype bf16: strategy deepspeed holds all that is trained in one type, and the model keeps {listed(kept)} "
            "in fp32: set dtype fp32, or strategy ddp"
        )
    for weight in trained.values():
        if weight.dtype != torch.bfloat16:  # a fresh score head
            weight.data = weight.data.to(torch.bfloat16)
    return config | {"bf16": {"enabled": True, "check_grad_overflow": True}}


def _keeps_in_fp32(module: nn.Module, name: str) -> bool:
    return any(kept_in_fp32(part, name) for part in module.modules())


def _with_bucket(zero: dict[str, Any], shapes: Mapping[str, torch.Size]) -> dict[str, Any]:
    """DeepSpeed allocates a bucket for gradients whole, so it is no larger than they are unless the user's file says so."""
    return {"reduce_bucket_size": min(BUCKET_ELEMENTS, sum(shape.numel() for shape in shapes.values()))} | zero

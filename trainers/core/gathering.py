"""Split models while responses are sampled: forward passes of which every process makes as many as it likes."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule

from trainers.core.attention import with_a_cache
from trainers.core.compiling import uncompiled
from trainers.core.sharding import HOW, computes_on, is_split, local, whole_shape

ROOM = 0.1
"""Share of a device's memory that whole weights leave to the cache of keys and values."""


@contextmanager
def gathered(model: nn.Module) -> Iterator[None]:
    """Processes may make different numbers of forward passes inside, as in generation, where responses end early.

    All of them have all weights, gathered once, and wait for nobody; or, where the whole does not fit a device, its
    layers one after the other for every token, and make as many passes as any of them.
    """
    zero = next((p._z3_optimizer for p in model.parameters() if hasattr(p, "_z3_optimizer")), None)
    if zero is None and not is_split(model):
        yield
        return
    found = in_step(model) if not fits(model) else _by_fsdp(model) if zero is None else _by_zero(model, zero)
    with found:
        yield


@contextmanager
def _by_fsdp(model: nn.Module) -> Iterator[None]:
    modules = [module for module in model.modules() if isinstance(module, FSDPModule)]
    for module in modules:  # the model itself is the first: it has to be known as the root before its parts
        module.unshard()
        module.set_reshard_after_forward(False, recurse=False)
    try:
        yield
    finally:
        for module in modules:
            module.set_reshard_after_forward(HOW[module].reshard, recurse=False)
            module.reshard()


def _by_zero(model: nn.Module, optimizer: Any) -> AbstractContextManager[Any]:
    """DeepSpeed asks for its engine, of which it uses these two."""
    from deepspeed.runtime.zero import unwrap_model_for_generation

    return unwrap_model_for_generation(SimpleNamespace(parameters=model.parameters, optimizer=optimizer))


# ---------------------------------------------------------------- where the whole does not fit


def fits(model: nn.Module) -> bool:
    """Whether every process's device has room for what of a model it has not. A CPU's memory is not asked."""
    if not torch.cuda.is_available():
        return True
    missing = missing_bytes(model)
    free, total = torch.cuda.mem_get_info()
    free += torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    enough = torch.tensor(missing + ROOM * total <= free, dtype=torch.int32, device="cuda")
    dist.all_reduce(enough, dist.ReduceOp.MIN)
    if not enough and dist.get_rank() == 0:
        print(
            f"sampling gathers layers for every token: {missing / 2**30:.1f} GiB of the model lie elsewhere, and "
            f"{free / 2**30:.1f} GiB are free on this device"
        )
    return bool(enough)


def missing_bytes(model: nn.Module) -> int:
    """What of a model this process has not, in the type in which it is gathered."""
    types: dict[nn.Parameter, torch.dtype | None] = {}
    for module in (module for module in model.modules() if module in HOW):  # an inner group after the one around it
        types |= dict.fromkeys(module.parameters(), HOW[module].gather_dtype)

    def size(weight: nn.Parameter) -> int:
        bytes_each: int = (types.get(weight) or weight.dtype).itemsize
        return (whole_shape(weight).numel() - local(weight).numel()) * bytes_each

    return sum(map(size, model.parameters()))


@contextmanager
def in_step(model: nn.Module) -> Iterator[None]:
    """Before each pass processes say that they make one; who has none left makes passes over one token for the others."""
    device = computes_on(model)

    def any_goes_on(this_one: bool) -> bool:
        flag = torch.tensor(float(this_one), device=device)
        dist.all_reduce(flag, dist.ReduceOp.MAX)
        return bool(flag)

    def say_so(*_: Any) -> None:
        any_goes_on(True)

    with model.register_forward_pre_hook(say_so, prepend=True):  # before the hook that gathers
        yield
    one = torch.zeros((1, 1), dtype=torch.int64, device=device)
    with torch.no_grad(), with_a_cache(model), uncompiled():
        while any_goes_on(False):
            model(input_ids=one, use_cache=False)

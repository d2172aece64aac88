"""Weights go from FSDP's shards, as which they were read, to ZeRO's parts."""

import gc
from typing import Any

from torch import nn
from torch.distributed._composable.contract import REGISTRY_KEY, STATE_KEY
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from trainers.core.sharding import release, whole

MARKS = (STATE_KEY, REGISTRY_KEY, "_is_fsdp_managed_module", "_fsdp_use_orig_params")
"""What splitting has left at modules."""


def hand_over(module: nn.Module, config: dict[str, Any]) -> None:
    """Let ZeRO's third stage split what FSDP has split, in place. One weight at a time is whole; all processes take part.

    Modules and weights are what they were before FSDP, so a weight with several names is still one.
    """
    release(module)
    for part in list(module.modules()):
        if isinstance(part, FSDPModule):
            _take_off(part)
        for mark in MARKS:
            vars(part).pop(mark, None)
    gc.collect()  # what it had made of modules refers to itself, and to the shards
    places: dict[DTensor, list[tuple[nn.Module, str]]] = {}
    for owner in module.modules():
        for name, weight in owner.named_parameters(recurse=False):
            if isinstance(weight, DTensor):
                places.setdefault(weight, []).append((owner, name))
    while places:
        shard, owners = places.popitem()
        weight = _split(nn.Parameter(whole(shard.detach()), requires_grad=shard.requires_grad), config)
        for owner, name in owners:
            setattr(owner, name, weight)


def _split(weight: nn.Parameter, config: dict[str, Any]) -> nn.Parameter:
    from deepspeed import zero

    zero.Init(module=nn.ParameterList([weight]), config_dict_or_path=config)
    return weight


def _take_off(part: Any) -> None:
    """Make a module of FSDP's again what it was: torch has no way back of its own, so a test compares all that it adds."""
    state = fully_shard.state(part)  # type: ignore[attr-defined]
    hooks = [state._pre_forward_hook_handle, state._post_forward_hook_handle]
    for group in state._fsdp_param_groups:
        hooks += group._module_to_pre_save_state_dict_hook_handle.values()
        hooks += group._module_to_pre_load_state_dict_hook_handle.values()
        hooks += [weight._post_load_hook_handle for weight in group.fsdp_params]
    for hook in hooks:
        hook.remove()
    part.__class__ = type(part).__mro__[part._orig_cls_mro_index]

"""Models whose weights are split over processes by torch's FSDP2: how they are split, gathered and looked at.

Every decoder layer is a group of weights that are gathered together, as are embeddings and head unless they are one.
"""

import os
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import PrefixChange
from transformers.distributed import DistributedConfig

from trainers.contract import BadInput
from trainers.core.layers import backbone, decoder_layers, score_head_name
from trainers.core.presence import be_patient
from trainers.spec import Parallel


@dataclass(frozen=True)
class How:
    """How a module is split: FSDP2 can be told, but not asked."""

    reshard: bool
    """Whether its weights are freed after its forward pass."""
    gather_dtype: torch.dtype | None


HOW: WeakKeyDictionary[nn.Module, How] = WeakKeyDictionary()


@dataclass(frozen=True)
class Sharding:
    """How models are split; of one dimension, or replicas x shards (hybrid)."""

    mesh: DeviceMesh
    gather_dtype: torch.dtype | None = None
    """Type that layers' weights are gathered in; None: as they are held. Embeddings, head and last norm always are (ADR 6)."""
    reshard: bool = True
    """Whether a layer's weights are freed between its forward and its backward pass."""
    offload: bool = False
    """Whether shards lie in the machine's memory."""

    @property
    def world(self) -> int:
        return self.mesh.size()

    def apply(self, model: PreTrainedModel) -> None:
        """Split a model in place, or what of it is not split yet.

        One on the meta device is loaded afterwards, and every process reads its shards alone.
        """
        if isinstance(model, FSDPModule):
            return
        _remember_conversions(model)
        for module, gathered in self._groups(model):
            if not isinstance(module, FSDPModule):
                self._shard(module, self.reshard, gathered)
        # A score head is small, and adapters come with a copy of it: it stays whole.
        name = score_head_name(model)
        heads = set(getattr(model, name).parameters()) if name is not None else set()
        self._shard(model, False, None, heads)
        for parameter in (head for head in heads if not head.is_meta):
            parameter.data = parameter.data.to(self.mesh.device_type)

    def _groups(self, model: PreTrainedModel) -> list[tuple[nn.Module, torch.dtype | None]]:
        """What is gathered together, and in which type; an inner group comes before the one around it.

        A group has weights of one type, so layers that an architecture keeps in fp32 are groups of their own. What is
        left of the backbone is one too, so that it can have another head; but embeddings that are the head as well
        belong to the whole model.
        """
        _, layers = decoder_layers(model, "splitting weights over processes")
        inner = [
            *((module, None) for module in _kept_in_fp32(model)),
            *((layer, self.gather_dtype) for layer in layers),
        ]
        ends = [model.get_input_embeddings(), model.get_output_embeddings()]
        weights = [end.weight for end in ends if end is not None]
        if len(weights) == 2 and weights[0] is weights[1]:
            return inner
        return [*inner, *((end, None) for end in ends if end is not None), (backbone(model), None)]

    def _precision(self, gathered: torch.dtype | None) -> MixedPrecisionPolicy:
        """Inputs stay as they are: between layers hidden states are fp32 under autocast, and what comes in is cast by it."""
        reduce = None if self.gather_dtype is None else torch.float32
        return MixedPrecisionPolicy(gathered, reduce, cast_forward_inputs=False)

    def _shard(
        self,
        module: nn.Module,
        reshard: bool,
        gathered: torch.dtype | None,
        ignored: set[nn.Parameter] | None = None,
    ) -> None:
        fully_shard(
            module,
            mesh=self.mesh,
            reshard_after_forward=reshard,
            mp_policy=self._precision(gathered),
            offload_policy=CPUOffloadPolicy(self.mesh.device_type == "cuda") if self.offload else OffloadPolicy(),
            ignored_params=ignored,
        )
        HOW[module] = How(reshard, gathered)

    @contextmanager
    def loading(self) -> Iterator[dict[str, Any]]:
        """Arguments for ``from_pretrained``, which inside splits the model before it reads any weight.

        transformers would split it by itself, but then hidden states are in bf16 between layers, where they are fp32
        without splitting.
        """

        def split(cls: Any, model: PreTrainedModel, *_: Any) -> PreTrainedModel:
            # transformers does so when all is read. A weight of two groups would be gathered from two copies where
            # processes have unequal parts, of which the optimizer updates one.
            model.tie_weights(recompute_mapping=False)
            self.apply(model)
            return model

        before = PreTrainedModel.__dict__.get("maybe_distribute_model")
        PreTrainedModel.maybe_distribute_model = classmethod(split)
        try:
            yield {"distributed_config": DistributedConfig(**self._sizes())}
        finally:
            if before is None:
                del PreTrainedModel.maybe_distribute_model
            else:
                PreTrainedModel.maybe_distribute_model = before

    def _sizes(self) -> dict[str, int]:
        if self.mesh.ndim == 1:
            return {"fsdp_size": self.mesh.size()}
        return {"dp_replicate_size": self.mesh.size(0), "fsdp_size": self.mesh.size(1)}


def sharding_for(parallel: Parallel, frozen: bool, bf16: bool, device: torch.device, world: int) -> Sharding | None:
    """How a phase's models are split over its ``world`` processes; None where every process holds whole ones.

    Under ZeRO's third stage those that are trained are read so, and are split by it when their engine is made.
    """
    if not (parallel.splits_frozen if frozen else parallel.splits_weights):
        return None
    settings = parallel.fsdp
    mesh = _mesh(device, world, hybrid=settings is not None and settings.hybrid)
    if frozen:
        return Sharding(mesh, offload=parallel.frozen == "offloaded")
    if parallel.deepspeed is not None:
        return Sharding(mesh, offload=parallel.deepspeed.offload_parameters)
    dtype = settings.gather_dtype if settings is not None else "auto"
    if dtype == "bf16" and not bf16:
        raise BadInput("parallel.fsdp.gatherDtype bf16: layers compute in fp32 here: set precision bf16, or remove it")
    gather = torch.bfloat16 if bf16 and dtype != "fp32" else None
    if settings is None:
        return Sharding(mesh, gather)
    return Sharding(mesh, gather, settings.reshard_after_forward, settings.cpu_offload)


def _mesh(device: torch.device, world: int, hybrid: bool) -> DeviceMesh:
    if not hybrid:
        return init_device_mesh(device.type, (world,), mesh_dim_names=("shard",))
    local = int(os.environ.get("LOCAL_WORLD_SIZE", world))
    mesh = init_device_mesh(device.type, (world // local, local), mesh_dim_names=("replicate", "shard"))
    for dimension in range(mesh.ndim):
        be_patient(mesh.get_group(dimension))
    return mesh


def _remember_conversions(model: Any) -> None:
    """How the names and layouts of a model's files are made of its own, which transformers finds by the classes of its parts.

    Those of split parts it does not know. From a model that is read it remembers them itself.
    """
    if getattr(model, "_weight_conversions", None) is None:
        found = get_model_conversion_mapping(model, add_legacy=False)
        model._weight_conversions = [entry for entry in found if not isinstance(entry, PrefixChange)] or None


def _kept_in_fp32(model: Any) -> list[nn.Module]:
    """Modules with weights that the architecture keeps in fp32 while the model is held in another type."""
    if model.dtype == torch.float32:
        return []
    parts = set(getattr(model, "_keep_in_fp32_modules_strict", None) or ())
    owners = {name.rpartition(".")[0] for name, _ in model.named_parameters() if set(name.split(".")) & parts}
    return [model.get_submodule(name) for name in sorted(owners, key=lambda name: -name.count("."))]


def is_split(model: nn.Module) -> bool:
    return any(isinstance(p, DTensor) for p in model.parameters())


def computes_on(model: nn.Module) -> torch.device:
    """The device of a model's forward passes; parts of its weights may lie elsewhere."""
    first = next(model.parameters())
    return torch.device(first.device_mesh.device_type) if isinstance(first, DTensor) else first.device


def local(tensor: torch.Tensor) -> torch.Tensor:
    """What of a tensor lies in this process; empty where it has no part of it."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """All of a tensor; every process takes part."""
    if hasattr(tensor, "ds_id"):
        with held_whole([tensor]):
            return tensor.detach().clone()
    if not isinstance(tensor, DTensor):
        return tensor
    on_device: Any = tensor.to(tensor.device_mesh.device_type)  # NCCL takes nothing from the machine's memory
    found: torch.Tensor = on_device.full_tensor()
    return found


def held_whole(weights: Iterable[torch.Tensor]) -> AbstractContextManager[Any]:
    """Weights that ZeRO's third stage splits are whole inside, everywhere; others are as they were."""
    split = [weight for weight in weights if hasattr(weight, "ds_id")]
    if not split:
        return nullcontext()
    from deepspeed.runtime.zero import GatheredParameters

    return GatheredParameters(split)


def whole_shape(weight: torch.Tensor) -> torch.Size:
    """Shape that a weight computes with: ZeRO's third stage leaves the weight itself empty, in 4 bits it is a column."""
    packed = getattr(weight, "quant_state", None)
    return torch.Size(packed.shape if packed is not None else getattr(weight, "ds_shape", weight.shape))


def release(model: nn.Module) -> None:
    """Give back gathered weights that wait for a backward pass, as after a forward pass without gradients.

    Only then are a model's parameters its shards, which are what an optimizer updates.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()

"""What a phase leaves as a model: a Hugging Face directory, safetensors only.

Weights are gathered, merged, checked and converted a layer at a time, so that a model of any size passes through: no
process ever holds more than its own part and a layer, and rank 0 one file besides.
"""

import re
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers.core_model_loading import revert_weight_conversion
from transformers.dynamic_module_utils import custom_object_save
from transformers.modeling_utils import remove_tied_weights_from_state_dict

from trainers.contract import Diverged
from trainers.core.adapters import save_adapters
from trainers.core.context import PhaseContext
from trainers.core.layers import kept_in_fp32
from trainers.core.models import LoadedModel
from trainers.core.quantization import dequantized, is_packed, is_turned
from trainers.core.sharding import held_whole, release, whole
from trainers.core.weight_files import WeightFiles
from trainers.files import new_directory

if TYPE_CHECKING:
    from peft.tuners.lora import LoraLayer  # half a second of every start, where there are no adapters

ADAPTER = "adapter"
"""Folder in the model's directory with the low-rank adapters alone, if there were any."""


@dataclass(frozen=True)
class Weight:
    """A weight of the model that is saved, as it is held."""

    name: str
    held: torch.Tensor
    adapted: "LoraLayer | None" = None
    """The layer around it, whose adapter is to be merged."""


def save_model(ctx: PhaseContext, loaded: LoadedModel) -> None:
    """Leave the phase's model, of which every process may hold a part. Raises Diverged if a weight is not finite."""
    ctx.meter.stage("saving")
    write_model(loaded, ctx.dir.model, writes=ctx.workers.is_main)


def write_model(loaded: LoadedModel, directory: Path, writes: bool = True) -> None:
    """Write a Hugging Face model directory, all or nothing: adapters merged, and beside that alone.

    All processes take part; one ``writes``. Raises Diverged if a weight is not finite: the last step's update is seen
    by no loss.
    """
    # A bf16 weight rounds a small update away: what adapters have learned in a short run would not be in the model.
    dtype = loaded.export_dtype or (loaded.model.dtype if loaded.adapters is None else torch.float32)
    release(loaded.model)
    with new_directory(directory) if writes else nullcontext(directory) as folder:
        if loaded.adapters is not None:
            save_adapters(loaded.adapters, folder / ADAPTER, writes)
        files = WeightFiles(folder)
        for weights in _layers(loaded.model):
            found = {weight.name: _ready(weight, loaded.model, dtype) for weight in weights}
            if writes:
                _check_finite(found)
                files.add(revert_weight_conversion(loaded.model, found))
            del found
        if writes:
            files.close()
            _write_settings(loaded, dtype, folder)


def _layers(model: Any) -> Iterator[list[Weight]]:
    """Weights, those together of which transformers may make one when it names and stacks them as its files do."""
    groups: dict[str, list[Weight]] = {}
    for weight in _weights(model):
        layer = re.match(r"(.*?\.\d+)\.", weight.name)
        groups.setdefault(layer[1] if layer else weight.name.rpartition(".")[0], []).append(weight)
    yield from groups.values()


def _weights(model: Any) -> Iterator[Weight]:
    """What the model's files hold: without adapters, and of weights that are one only one."""
    state = model.state_dict(keep_vars=True)
    state = {name: tensor for name, tensor in state.items() if not _is_adapters(name) and not _is_of_packed(name)}
    saved = _untied({_plain(name): tensor for name, tensor in state.items()}, model)
    for name, tensor in state.items():
        if _plain(name) in saved:
            yield Weight(_plain(name), tensor, _adapter_of(name, model))


def _adapter_of(name: str, model: Any) -> "LoraLayer | None":
    """The layer that has a weight's adapter. peft puts one around the other where a module has several adapted weights."""
    owner, _, last = name.rpartition(".")
    while owner.endswith(".base_layer"):
        owner = owner.removesuffix(".base_layer")
        layer = model.get_submodule(owner)
        if last == getattr(layer, "parameter_name", "weight"):
            return layer
    return None


def _plain(name: str) -> str:
    """A weight's name without what peft puts around its layer."""
    return re.sub(r"(\.base_layer)+\.", ".", name).replace(".modules_to_save.default.", ".")


def _is_adapters(name: str) -> bool:
    """Of an adapter, or of a head whose trained copy takes its place."""
    return ".lora_" in name or ".original_module." in name


def _is_of_packed(name: str) -> bool:
    """Of what lies beside a packed weight: it is saved whole."""
    return ".weight." in name


def _untied(state: dict[str, torch.Tensor], model: Any) -> set[str]:
    """Names that are saved, by transformers' own choice, which goes by storage: split weights get one to go by."""
    ignored = set(model._keys_to_ignore_on_save or ())
    storage = {id(tensor): torch.empty(1) for tensor in state.values()}
    found = {name: storage[id(tensor)] for name, tensor in state.items() if name not in ignored}
    return set(remove_tied_weights_from_state_dict(found, model))


@torch.no_grad()
def _ready(weight: Weight, model: Any, dtype: torch.dtype) -> torch.Tensor:
    """The whole weight, merged, in the type that is saved; all processes take part."""
    found = dequantized(weight.held) if is_packed(weight.held) else whole(weight.held).detach()
    if weight.adapted is not None:
        found = _merged(found.to(torch.float32 if dtype == torch.float32 else found.dtype, copy=True), weight.adapted)
    if is_turned(weight.held):
        found = found.T.contiguous()
    parameter = isinstance(weight.held, nn.Parameter)
    return found.to(dtype) if parameter and not kept_in_fp32(model, weight.name) else found


def _merged(weight: torch.Tensor, layer: "LoraLayer") -> torch.Tensor:
    """As peft merges: what is added to embeddings is first rounded to their type."""
    from peft.tuners.lora import Embedding

    with held_whole(p for name, p in layer.named_parameters() if "lora_" in name):
        delta = layer.get_delta_weight("default").detach()
    return weight.add_(delta.to(weight.dtype) if isinstance(layer, Embedding) else delta)


def _check_finite(weights: dict[str, torch.Tensor]) -> None:
    for name, weight in weights.items():
        if not weight.isfinite().all():
            raise Diverged(f"{name} is not finite after the last step; try a lower optim.lr")


def _write_settings(loaded: LoadedModel, dtype: torch.dtype, folder: Path) -> None:
    """What ``save_pretrained`` writes beside weights."""
    model = loaded.model
    write_stop_tokens(loaded)
    model.config.dtype = str(dtype).removeprefix("torch.")
    model.config.architectures = [type(model).__name__.removeprefix("FSDP")]
    if model.is_remote_code():
        custom_object_save(model, folder, config=model.config)
    model.config.save_pretrained(folder)
    if model.can_generate():
        model.generation_config.save_pretrained(folder)
    loaded.tokenizer.save_pretrained(folder)


def write_stop_tokens(loaded: LoadedModel) -> None:
    """Say in the model's generation settings at which tokens responses end, so that plain ``generate`` stops there too."""
    settings = getattr(loaded.model, "generation_config", None)
    if settings is None:  # a classifier
        return
    stop = sorted(loaded.chat.stop_ids)
    settings.eos_token_id = stop if len(stop) > 1 else stop[0]
    settings.pad_token_id = loaded.tokenizer.pad_token_id
    _make_savable(settings)


def _make_savable(settings: Any) -> None:
    """Published settings may name a temperature without sampling, which transformers reads and refuses to write."""
    try:
        settings.validate(strict=True)
    except ValueError:
        settings.do_sample = True

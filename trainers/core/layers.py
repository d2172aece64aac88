"""Parts of models by what they are: decoder layers, of which a smaller model is made, score heads, weights of a type."""

import copy
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch import nn

from trainers.contract import BadInput

T = TypeVar("T")

HELD = "held"
"""A type of rotary angles that transformers does not know."""
NOT_OF_A_LAYER = ("layer_idx", "training")
"""Numbers that a layer has by its place, or for the time being."""


def backbone(model: Any) -> Any:
    """The part of a model that makes hidden states, without a head. Raises BadInput where none is known."""
    found = getattr(model, model.base_model_prefix, None) or getattr(model, "model", None)
    if found is None:
        raise BadInput(f"models of type {model.config.model_type} cannot be used: no backbone is known of them")
    return found


def as_forward(module: Any, function: Callable[..., T], *args: Any) -> T:
    """Call a function in the place of a module's forward pass, with all that hangs on the module's being called.

    Whoever computes with a module's weights in another way than its ``forward`` does so inside: strategies that split
    weights over processes gather them when a module is called, and again in its backward pass.
    """
    before = module.__dict__.get("forward")
    module.forward = function
    try:
        found: T = module(*args)
        return found
    finally:
        del module.forward
        if before is not None:
            module.forward = before


def hold(model: Any, dtype: torch.dtype) -> Any:
    """Turn a model's weights into a type, in place, as ``from_pretrained`` would have loaded them.

    A module's own ``to`` turns its tables too: in bf16 rotary angles are off by a 256th, and what was trained with them
    is another model once it is loaded again. Weights that an architecture keeps in fp32 stay so.
    """
    for name, weight in model.named_parameters():
        if not kept_in_fp32(model, name):
            weight.data = weight.data.to(dtype)
    return model


def hold_angles(model: Any) -> None:
    """Keep rotary angles as they are: those of short rows, whatever the longest of a batch (:mod:`trainers.rotary`).

    transformers turns them by the type that a module names. One that it does not know leaves them, and fails loudly if a
    module's tables are made anew.
    """
    for module in model.modules():
        kinds = getattr(module, "rope_type", None)
        if isinstance(kinds, dict):
            module.rope_type = {layer: _held(kind) for layer, kind in kinds.items()}
        elif isinstance(kinds, str):
            module.rope_type = _held(kinds)


def _held(kind: str) -> str:
    return HELD if "dynamic" in kind or kind == "longrope" else kind


def kept_in_fp32(model: Any, name: str) -> bool:
    """Whether an architecture keeps a weight in fp32, whatever type the model is held in."""
    return any(part in name for part in getattr(model, "_keep_in_fp32_modules_strict", None) or ())


def keep_layers(model: Any, layers: tuple[int, ...]) -> Any:
    """A copy of a model with only these decoder layers.

    Raises BadInput if it has too few, or if a layer would be another in its new place, as in models whose config says
    by number which layers are of which kind.
    """
    small = with_fewer_layers(model, layers)
    weights = _renumbered(model.state_dict(), decoder_layers(model, "teacherLayers")[0], layers)
    for name, weight in small.named_parameters():
        weight.data = weight.data.to(weights[name].dtype)
    small.load_state_dict(weights)
    # It may name more end tokens than the tokenizer does.
    small.generation_config = copy.deepcopy(model.generation_config)
    return small


def keep_split_layers(model: Any, layers: tuple[int, ...], split: Callable[[Any], None]) -> Any:
    """The same of a model that is split over processes; ``split`` splits the smaller one alike. Weights are shared."""
    with torch.device("meta"):
        small = with_fewer_layers(model, layers)
    split(small)
    place, _ = decoder_layers(model, "teacherLayers")
    small.load_state_dict(_renumbered(model.state_dict(), place, layers), assign=True)
    tables = _renumbered(dict(model.named_buffers()), place, layers)
    for name, _ in list(small.named_non_persistent_buffers()):
        owner, _, own_name = name.rpartition(".")
        small.get_submodule(owner).register_buffer(own_name, tables[name], persistent=False)
    small.tie_weights()
    small.generation_config = copy.deepcopy(model.generation_config)
    return small


def with_fewer_layers(model: Any, layers: tuple[int, ...]) -> Any:
    """A model that could hold these decoder layers alone, with weights of its own. Raises as :func:`keep_layers` does."""
    _, found = decoder_layers(model, "teacherLayers")
    if layers[-1] >= len(found):
        raise BadInput(f"teacherLayers {list(layers)}: the teacher has layers 0 to {len(found) - 1}")
    small = type(model)(_kept_config(model.config, layers))
    for old, new in zip((found[i] for i in layers), decoder_layers(small, "teacherLayers")[1], strict=True):
        if _settings(old) != _settings(new):
            kind = model.config.model_type
            raise BadInput(f"teacherLayers {list(layers)}: in models of type {kind} these layers would be others there")
    return small


def decoder_layers(model: Any, wanted_by: str) -> tuple[str, nn.ModuleList]:
    """Name within the model, and modules. Raises BadInput for a model that has no plain list of them."""
    count = model.config.num_hidden_layers
    decoder = backbone(model)
    found = [m for m in decoder.modules() if isinstance(m, nn.ModuleList) and len(m) == count]
    if not found:
        raise BadInput(
            f"{wanted_by} needs a model with a plain list of decoder layers; {model.config.model_type} has none"
        )
    return next(name for name, module in model.named_modules() if module is found[0]), found[0]


def _kept_config(config: Any, layers: tuple[int, ...]) -> Any:
    """The config of the smaller model: what it lists by layer is that of the kept ones."""
    count = config.num_hidden_layers
    kept = copy.deepcopy(config)
    for name, value in vars(config).items():
        if "layer" in name and isinstance(value, list) and len(value) == count:
            setattr(kept, name, [value[i] for i in layers])
    dense = getattr(config, "first_k_dense_replace", None)  # DeepSeek: the layers before it have no experts
    if dense is not None:
        kept.first_k_dense_replace = sum(i < dense for i in layers)
    kept.num_hidden_layers = len(layers)
    return kept


def _settings(layer: Any) -> list[Any]:
    """What a layer is: its modules, the shapes of its weights, and the plain numbers that they compute with."""
    found: list[Any] = [(name, tuple(weight.shape)) for name, weight in layer.named_parameters()]
    for module in layer.modules():
        plain = {k: v for k, v in vars(module).items() if isinstance(v, bool | int | float | str)}
        kind = type(module).__name__.removeprefix("FSDP")  # a split model's modules have classes of their own
        found.append((kind, {k: v for k, v in plain.items() if k not in NOT_OF_A_LAYER and k[0] != "_"}))
    return found


def _renumbered(state: Mapping[str, torch.Tensor], place: str, layers: tuple[int, ...]) -> dict[str, torch.Tensor]:
    """A model's tensors by name as they are called with these layers alone."""
    marker = f"{place}."
    found = {}
    for name, tensor in state.items():
        if name.startswith(marker):
            index, rest = name[len(marker) :].split(".", 1)
            if int(index) not in layers:
                continue
            found[f"{marker}{layers.index(int(index))}.{rest}"] = tensor
        else:
            found[name] = tensor
    return found


def score_head_name(model: Any) -> str | None:
    """Attribute of a sequence classifier that makes scores of hidden states; None for other models."""
    return next((name for name in ("score", "classifier") if isinstance(getattr(model, name, None), nn.Module)), None)


def score_head(model: Any) -> Any:
    """The linear layer that makes a score of a hidden state, or peft's trained copy of it."""
    head = getattr(model, score_head_name(model) or "", None)
    if isinstance(getattr(head, "original_module", head), nn.Linear):
        return head
    raise BadInput(f"models of type {model.config.model_type} have no linear score head")

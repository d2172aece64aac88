"""Parts of models by what they are: decoder layers, of which a smaller model is made, and score heads."""

import copy
from typing import Any

import torch
from torch import nn

from trainers.contract import BadInput


def keep_layers(model: Any, layers: tuple[int, ...]) -> Any:
    """A copy of a Llama-like model with only these decoder layers."""
    decoder = getattr(model, model.base_model_prefix)
    if not isinstance(getattr(decoder, "layers", None), nn.ModuleList):
        raise BadInput(
            f"teacherLayers needs a model with a plain list of decoder layers; {model.config.model_type} has none"
        )
    count = len(decoder.layers)
    if layers[-1] >= count:
        raise BadInput(f"teacherLayers {list(layers)}: the teacher has layers 0 to {count - 1}")
    config = copy.deepcopy(model.config)
    config.num_hidden_layers = len(layers)
    if getattr(config, "layer_types", None):
        config.layer_types = [config.layer_types[i] for i in layers]
    small = type(model)(config).to(next(model.parameters()).dtype)
    small.load_state_dict(_kept_weights(model, layers))
    # It may name more end tokens than the tokenizer does.
    small.generation_config = copy.deepcopy(model.generation_config)
    return small


def _kept_weights(model: Any, layers: tuple[int, ...]) -> dict[str, torch.Tensor]:
    """The state dict with layers renumbered."""
    marker = f"{model.base_model_prefix}.layers."
    weights = {}
    for name, tensor in model.state_dict().items():
        if name.startswith(marker):
            index, rest = name[len(marker) :].split(".", 1)
            if int(index) not in layers:
                continue
            weights[f"{marker}{layers.index(int(index))}.{rest}"] = tensor
        else:
            weights[name] = tensor
    return weights


def score_head_name(model: Any) -> str | None:
    """Attribute of a sequence classifier that makes scores of hidden states; None for other models."""
    return next((name for name in ("score", "classifier") if isinstance(getattr(model, name, None), nn.Module)), None)


def score_head(model: Any) -> Any:
    """The linear layer that makes a score of a hidden state, or peft's trained copy of it."""
    head = getattr(model, score_head_name(model) or "", None)
    if isinstance(getattr(head, "original_module", head), nn.Linear):
        return head
    raise BadInput(f"models of type {model.config.model_type} have no linear score head")

"""Heads: the layers that make logits or scores of final hidden states.

From the last hidden state on everything is fp32, whatever the weights' type and autocast are. A bf16 score has eight
bits: of 300 sequences 258 got distinct ones.

Names: k positions, V vocabulary, H hidden width.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, TypeVar

import torch
from torch import nn
from torch.func import functional_call

from trainers.core.layers import as_forward
from trainers.core.products import Linear, linear

T = TypeVar("T")


def in_fp32(head: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
    """What a head makes of hidden states, computed in fp32."""

    def run(hidden: torch.Tensor) -> torch.Tensor:
        return product(head, fp32_weights(head), hidden)

    with torch.autocast(hidden.device.type, enabled=False):
        return called(head, run, hidden.float())


def called(head: Any, run: Callable[[torch.Tensor], T], hidden: torch.Tensor) -> T:
    """``run`` of hidden states in the place of a head's forward pass, while all that owns its weights is being called."""
    owners = [head.base_layer, head.lora_A["default"], head.lora_B["default"]] if is_adapted(head) else [head]
    for owner in owners:
        run = partial(as_forward, owner, run)
    return run(hidden)


def head_logits(model: Any, hidden: torch.Tensor) -> torch.Tensor:
    """(k, H) to (k, V) in fp32, with the scale and soft cap that some architectures put on their logits."""
    return scaled(model, in_fp32(model.get_output_embeddings(), hidden))


def scaled(model: Any, logits: torch.Tensor) -> torch.Tensor:
    """What a model makes of its head's product: the scale and soft cap that some architectures have."""
    config = model.config.get_text_config()
    if scale := getattr(config, "logit_scale", None):  # Cohere
        logits = logits * scale
    if scaling := getattr(config, "logits_scaling", None):  # Granite
        logits = logits / scaling
    if multiplier := getattr(config, "lm_head_multiplier", None):  # Falcon-H1
        logits = logits * multiplier
    if cap := getattr(config, "final_logit_softcapping", None):  # Gemma 2
        logits = cap * torch.tanh(logits / cap)
    return logits


# ---------------------------------------------------------------- within a call of the head


def fp32_weights(head: nn.Module) -> dict[str, torch.Tensor]:
    """By name. Those of another type are converted here, once for a call, whose gradients so add up in fp32."""
    return {name: weight.float() for name, weight in head.named_parameters()}


def product(head: nn.Module, weights: Mapping[str, torch.Tensor], hidden: torch.Tensor) -> torch.Tensor:
    """What a head makes of hidden states with these weights in the place of its own."""
    if is_plain(head):
        return linear(hidden, weights["weight"], weights.get("bias"))
    if is_adapted(head):
        return _adapted(head, weights, hidden)
    found: torch.Tensor = functional_call(_Own(head), {f"head.{name}": w for name, w in weights.items()}, (hidden,))
    return found


def is_plain(head: nn.Module) -> bool:
    """Whether a head is a product with one matrix, and perhaps a bias, as embeddings are too. One with adapters is more."""
    ours_or_torchs = (nn.Linear.forward, Linear.forward)
    return isinstance(head, nn.Embedding) or (isinstance(head, nn.Linear) and type(head).forward in ours_or_torchs)


def is_adapted(head: Any) -> bool:
    """Whether a head is a linear layer with peft's low-rank adapter."""
    return hasattr(head, "lora_A") and isinstance(head.base_layer, nn.Linear)


def _adapted(head: Any, weights: Mapping[str, torch.Tensor], hidden: torch.Tensor) -> torch.Tensor:
    """As peft's own forward pass, which would call the layers that own the weights."""
    found = linear(hidden, weights["base_layer.weight"], weights.get("base_layer.bias"))
    if head.disable_adapters:
        return found
    narrow = linear(head.lora_dropout["default"](hidden), weights["lora_A.default.weight"])
    return found + linear(narrow, weights["lora_B.default.weight"]) * head.scaling["default"]


class _Own(nn.Module):
    """A head's own forward pass, without what hangs on its being called."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.head = head

    def forward(self, hidden: torch.Tensor) -> Any:
        return type(self.head).forward(self.head, hidden)

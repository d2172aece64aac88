"""Heads: the layers that make logits or scores of final hidden states.

From the last hidden state on everything is fp32, whatever the weights' type and autocast are. A bf16 score has eight
bits: of 300 sequences 258 got distinct ones.

Names: k positions, V vocabulary, H hidden width.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.func import functional_call
from torch.nn.functional import linear

from trainers.core.layers import as_forward


def in_fp32(head: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
    """What a head makes of hidden states, computed in fp32."""

    def run(hidden: torch.Tensor) -> torch.Tensor:
        return product(head, fp32_weights(head), hidden)

    with torch.autocast(hidden.device.type, enabled=False):
        return as_forward(head, run, hidden.float())


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
    found: torch.Tensor = functional_call(_Own(head), {f"head.{name}": w for name, w in weights.items()}, (hidden,))
    return found


def is_plain(head: nn.Module) -> bool:
    """Whether a head is a product with one matrix, and perhaps a bias. One with adapters is more."""
    return isinstance(head, nn.Linear) and type(head).forward is nn.Linear.forward


class _Own(nn.Module):
    """A head's own forward pass, without what hangs on its being called."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.head = head

    def forward(self, hidden: torch.Tensor) -> Any:
        return type(self.head).forward(self.head, hidden)

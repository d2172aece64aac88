"""Linear layers as oneDNN multiplies them, while responses are sampled on a processor in fp32.

torch leaves such products to MKL, which uses a half of what processors by others than Intel can do: on an AMD EPYC with AVX-512
a step of 16 to 64 rows takes 2.2 to 2.5 times as long as by oneDNN, which torch has as well. It wants weights in an order of its
own, so they are copied at the start: two to three milliseconds a million.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from trainers.core.layers import decoder_layers
from trainers.core.lean import JOINED, is_lean
from trainers.core.products import Linear, filled
from trainers.sizing.at_once import FEWEST_ROWS, LARGEST_COPY

ROWS = 64
"""What the copies' order is best for; as good as any for other numbers, but for one row."""


@contextmanager
def packed_linears(model: nn.Module, rows: int) -> Iterator[None]:
    """A model's linear layers multiply so inside, where they can. Their weights must not change meanwhile."""
    layers = _layers(model) if _pays(rows) else []
    joined = _joined(model, layers)
    apart = [layer for layer in layers if not any(layer in some for some in joined.values())]
    for attention, some in joined.items():
        attention.__dict__[JOINED] = _packed(some)
    for layer in apart:
        layer.forward = _packed([layer])
    try:
        yield
    finally:
        for attention in joined:
            del attention.__dict__[JOINED]
        for layer in apart:
            del layer.forward


def _layers(model: nn.Module) -> list[Any]:
    layers: list[Any] = [module for module in model.modules() if _can(module)]
    size = sum(layer.weight.numel() * layer.weight.element_size() for layer in layers)
    return layers if size <= LARGEST_COPY else []


def _joined(model: Any, layers: list[Any]) -> dict[Any, list[Any]]:
    """Attentions whose queries, keys and values are made by layers of these, with the three of each."""
    if not layers or not is_lean(model):
        return {}
    decoder: list[Any] = list(decoder_layers(model, "sampling")[1])
    projections = {layer.self_attn: _projections(layer.self_attn) for layer in decoder}
    return {attention: some for attention, some in projections.items() if all(layer in layers for layer in some)}


def _projections(attention: Any) -> list[Any]:
    return [attention.q_proj, attention.k_proj, attention.v_proj]


def _packed(layers: list[Any]) -> Callable[[torch.Tensor], torch.Tensor]:
    """The product of layers that take the same inputs, with a copy of their weights in oneDNN's order."""
    weight = torch.cat([layer.weight.detach() for layer in layers]) if len(layers) > 1 else layers[0].weight.detach()
    biases = [layer.bias for layer in layers if layer.bias is not None]
    bias = None if not biases else biases[0] if len(biases) == 1 else torch.cat(biases)
    packed = torch.ops.mkldnn._reorder_linear_weight.default(weight, ROWS)
    return partial(_product, packed, bias)


def _product(weight: torch.Tensor, bias: torch.Tensor | None, inputs: torch.Tensor) -> torch.Tensor:
    """Rows are filled up to the next number that there is a program for."""
    rows = inputs if inputs.ndim == 2 else inputs.flatten(0, -2)
    found: torch.Tensor = torch.ops.mkldnn._linear_pointwise.default(filled(rows), weight, bias, "none", [], "")
    return found if inputs.ndim == 2 and len(found) == len(rows) else found.resize_(*inputs.shape[:-1], found.shape[-1])


def _can(module: Any) -> bool:
    """Plain layers: neither packed in bits, nor split over processes, nor with a forward pass of somebody else's."""
    if type(module) not in (nn.Linear, Linear) or "forward" in module.__dict__:
        return False
    weight = module.weight
    whole = type(weight) is nn.Parameter and weight.numel() > 0 and not hasattr(weight, "ds_id")
    return whole and weight.device.type == "cpu" and weight.dtype == torch.float32


def _pays(rows: int) -> bool:
    """Whether there are rows enough, and oneDNN: its operations are torch's own compiler's, so a version may lack them."""
    if rows < FEWEST_ROWS:
        return False
    named = all(hasattr(torch.ops.mkldnn, name) for name in ("_linear_pointwise", "_reorder_linear_weight"))
    return named and torch.backends.mkldnn.is_available() and not torch.is_autocast_enabled("cpu")

"""Decoders of llama's kind in few operations, while tokens are sampled one by one.

transformers takes some sixty operations of a layer and two hundred lines of Python around them, which is most of a small
model's step. Linear layers are called, so adapters, packed weights and what gathers split ones are as they were; prompts
go through transformers' own forward pass.

Names: B rows, H heads, D width of a head.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch.nn.functional import rms_norm, scaled_dot_product_attention

from trainers.core.layers import backbone, decoder_layers

LLAMAS = frozenset({"llama", "mistral", "qwen2", "qwen3"})
BY_LENGTH = ("dynamic", "longrope")
"""Rotary angles that change with how far a row has come."""

Turn = tuple[torch.Tensor, torch.Tensor]
"""Cosines, and sines with their signs, of tokens' rotary angles: (B, 1, D) each."""


class Lean:
    """A whole model's step: only where nothing hangs on its modules' being called, as what gathers split weights does."""

    def __init__(self, model: Any, longest: int) -> None:
        decoder = backbone(model)
        self.layers = list(decoder_layers(model, "sampling")[1])
        self.kinds = getattr(model.config, "layer_types", None)
        self.embed, self.norm, self.head = decoder.embed_tokens, decoder.norm, model.get_output_embeddings()
        self.rotary = decoder.rotary_emb
        self.fixed = self.rotary.rope_type not in BY_LENGTH
        self.longest = longest
        self.table: Turn | None = None

    def logits(self, tokens: torch.Tensor, positions: torch.Tensor, mask: Any, cache: Any) -> torch.Tensor:
        """(B, V) of what follows the tokens at these positions."""
        hidden = self.embed(tokens)
        turn = self._turn(hidden, positions)
        for number, layer in enumerate(self.layers):
            seen = mask[self.kinds[number]] if isinstance(mask, dict) and self.kinds else mask
            hidden = _layer(layer, hidden, seen, turn, cache)
        found: torch.Tensor = self.head(_normed(self.norm, hidden))
        return found

    def _turn(self, hidden: torch.Tensor, positions: torch.Tensor) -> Turn:
        if not self.fixed:
            return _signed(*self.rotary(hidden, positions[:, None]))
        if self.table is None:
            every = torch.arange(self.longest, device=positions.device)[:, None]
            self.table = _signed(*self.rotary(hidden, every))
        return self.table[0][positions], self.table[1][positions]


def is_lean(model: Any) -> bool:
    """Whether a model's step can be computed so as a whole."""
    return _can(model) and not any(part._forward_pre_hooks or part._forward_hooks for part in model.modules())


@contextmanager
def lean_layers(model: Any) -> Iterator[None]:
    """A model's layers compute so inside, where they can: for models that are called because something hangs on it."""
    if not _can(model) or is_lean(model):
        yield
        return
    layers = decoder_layers(model, "sampling")[1]
    before = [layer.__dict__.get("forward") for layer in layers]
    for layer in layers:
        layer.forward = partial(_forward, layer, layer.forward)
    try:
        yield
    finally:
        for layer, forward in zip(layers, before, strict=True):
            del layer.forward
            if forward is not None:
                layer.forward = forward


def _can(model: Any) -> bool:
    """Layers of this kind, with torch's own attention, whose norms have their weights without being called.

    Under ZeRO's third stage they have none until then.
    """
    own = model.config.model_type in LLAMAS and model.config._attn_implementation == "sdpa"
    return own and not any(hasattr(weight, "ds_id") for weight in model.parameters())


def _forward(
    layer: Any,
    own: Any,
    hidden: torch.Tensor,
    attention_mask: torch.Tensor | None,
    position_embeddings: tuple[torch.Tensor, torch.Tensor],
    past_key_values: Any,
    **given: Any,
) -> torch.Tensor:
    """In the place of a layer's own: (B, 1, width of the model), or a prompt's tokens."""
    if hidden.shape[1] > 1:
        states = {"position_embeddings": position_embeddings, "past_key_values": past_key_values}
        found: torch.Tensor = own(hidden, attention_mask=attention_mask, **states, **given)
        return found
    turn = _signed(*position_embeddings)
    return _layer(layer, hidden[:, 0], attention_mask, turn, past_key_values)[:, None]


def _layer(layer: Any, hidden: torch.Tensor, mask: torch.Tensor | None, turn: Turn, cache: Any) -> torch.Tensor:
    """(B, width of the model)"""
    hidden = hidden + _attention(layer.self_attn, _normed(layer.input_layernorm, hidden), mask, turn, cache)
    normed, mlp = _normed(layer.post_attention_layernorm, hidden), layer.mlp
    made: torch.Tensor = mlp.down_proj(mlp.act_fn(mlp.gate_proj(normed)).mul_(mlp.up_proj(normed)))
    return hidden.add_(made)


def _attention(module: Any, hidden: torch.Tensor, mask: torch.Tensor | None, turn: Turn, cache: Any) -> torch.Tensor:
    """Heads lie in the dimension of rows' tokens, of which there is one: (B, H, D) all along."""
    rows, width = len(hidden), module.head_dim
    query, key, value = (
        project(hidden).view(rows, -1, width) for project in (module.q_proj, module.k_proj, module.v_proj)
    )
    if hasattr(module, "q_norm"):
        query, key = _normed(module.q_norm, query), _normed(module.k_norm, key)
    query, key = _turned(query, key, turn)
    keys, values = cache.update(key[:, :, None], value[:, :, None], module.layer_idx)
    # Heads that share keys are tokens of one head here, which sees the same.
    grouped = query.view(rows, keys.shape[1], -1, width)
    made: torch.Tensor = module.o_proj(_seen(grouped, keys, values, mask, module.scaling).reshape(rows, -1))
    return made


def _seen(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor | None, scale: float
) -> torch.Tensor:
    """Attention; a prompt's first token, read alone, comes without a mask.

    On a processor two products take half as long as torch's kernel, which is made for many tokens a row.
    """
    if keys.device.type != "cpu" or keys.dtype != torch.float32:
        return scaled_dot_product_attention(query, keys, values, attn_mask=mask, scale=scale)
    scores = (keys @ (query * scale).transpose(-1, -2)).transpose(-1, -2)  # so the keys are read as they lie
    return (scores if mask is None else scores + mask).softmax(-1) @ values


def _signed(cos: torch.Tensor, sin: torch.Tensor) -> Turn:
    half = cos.shape[-1] // 2
    return cos, torch.cat([-sin[..., :half], sin[..., half:]], dim=-1)


def _turned(query: torch.Tensor, key: torch.Tensor, turn: Turn) -> tuple[torch.Tensor, torch.Tensor]:
    """Queries and keys by rotary angles, in one go."""
    both = torch.cat([query, key], dim=1)
    turned = torch.addcmul(both * turn[0], both.roll(both.shape[-1] // 2, -1), turn[1])
    first, second = turned.split([query.shape[1], key.shape[1]], dim=1)
    return first, second


def _normed(norm: Any, hidden: torch.Tensor) -> torch.Tensor:
    if not hidden.dtype == norm.weight.dtype == torch.float32:  # transformers rounds before it multiplies by the weight
        found: torch.Tensor = norm(hidden)
        return found
    return rms_norm(hidden, hidden.shape[-1:], norm.weight, norm.variance_epsilon)

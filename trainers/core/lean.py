"""Decoders of llama's kind in few operations, while responses are sampled.

transformers takes some sixty operations for a layer, and Python around them, which is most of a small model's step. Here a
prompt is read for its keys and values only, without padding but in attention, and nothing of the last layer is computed
behind them. Linear layers are called, so adapters, packed weights and what gathers split ones are as they were.

Names: N tokens, G prompts of at most W tokens, H heads, D width of a head, V vocabulary.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch.nn.functional import rms_norm, scaled_dot_product_attention

from trainers.core.layers import backbone, decoder_layers

LLAMAS = frozenset({"llama", "mistral", "qwen2", "qwen3"})
JOINED = "joined"
"""Attribute of an attention: what makes queries, keys and values in one product, where weights are copied anyway."""

Turn = tuple[torch.Tensor, torch.Tensor]
"""Cosines, and sines with their signs, of tokens' rotary angles: (N, 1, D) each."""


class Grid(NamedTuple):
    """Tokens of prompts that lie behind each other, as G rows of W: which row each is in, and where, (N,) both."""

    row: torch.Tensor
    column: torch.Tensor
    rows: int
    columns: int
    slots: torch.Tensor | None = None
    """Of each row, where what is looked at is kept: None where prompts begin, which look at themselves alone."""


class Lean:
    """A whole model's passes: only where nothing hangs on its modules' being called, as what gathers split weights does."""

    def __init__(self, model: Any, longest: int) -> None:
        decoder = backbone(model)
        self.layers: list[Any] = list(decoder_layers(model, "sampling")[1])
        self.kinds: Any = getattr(model.config, "layer_types", None)
        self.embed, self.norm, self.head = decoder.embed_tokens, decoder.norm, model.get_output_embeddings()
        self.rotary = decoder.rotary_emb
        self.longest = longest
        self.table: Turn | None = None

    def logits(self, tokens: torch.Tensor, positions: torch.Tensor, mask: Any, cache: Any) -> torch.Tensor:
        """(N, V) of what follows the tokens, each the next one of its row."""
        hidden = self.embed(tokens)
        turn = self._turn(hidden, positions)
        for number, layer in enumerate(self.layers):
            hidden = _layer(layer, hidden, self._of_kind(mask, number), turn, cache)
        found: torch.Tensor = self.head(_normed(self.norm, hidden))
        return found

    def read(self, tokens: torch.Tensor, positions: torch.Tensor, grid: Grid, mask: Any, cache: Any) -> None:
        """Keep keys and values of prompts' tokens.

        ``mask``: (W, W) where more is hidden than what comes later, (G, 1, W, positions) where something was read before.
        """
        hidden = self.embed(tokens)
        turn = self._turn(hidden, positions)
        for number, layer in enumerate(self.layers):
            attention = layer.self_attn
            query, key, value = _projected(attention, _normed(layer.input_layernorm, hidden), turn)
            kept = cache.layers[attention.layer_idx]
            kept.keep(key[:, :, None], value[:, :, None])
            if number + 1 < len(self.layers):
                if grid.slots is None:
                    keys, values = _in_rows(key, grid), _in_rows(value, grid)
                else:
                    keys, values = kept.of(grid.slots)
                seen = _seen_by_prompts(query, keys, values, grid, self._of_kind(mask, number), attention.scaling)
                hidden = _behind(layer, hidden, attention.o_proj(seen))

    def _of_kind(self, mask: Any, number: int) -> torch.Tensor | None:
        found: torch.Tensor | None = mask[self.kinds[number]] if isinstance(mask, dict) else mask
        return found

    def _turn(self, hidden: torch.Tensor, positions: torch.Tensor) -> Turn:
        if self.table is None:
            every = torch.arange(self.longest, device=positions.device)[:, None]
            self.table = _signed(*self.rotary(hidden, every))
        return self.table[0][positions], self.table[1][positions]


def is_lean(model: Any) -> bool:
    """Whether a model's passes can be computed so as a whole."""
    return _can(model) and not any(part._forward_pre_hooks or part._forward_hooks for part in model.modules())


@contextmanager
def lean_layers(model: Any) -> Iterator[None]:
    """A model's layers compute tokens so inside, where they can, if it has to be called because something hangs on that."""
    if is_lean(model) or not _can(model):
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
    config: Any = getattr(model, "config", None)
    own: bool = getattr(config, "model_type", None) in LLAMAS and config._attn_implementation == "sdpa"
    return own and not any(hasattr(weight, "ds_id") for weight in model.parameters())


def _forward(layer: Any, own: Any, hidden: torch.Tensor, **given: Any) -> torch.Tensor:
    """In the place of a layer's own forward pass, to which prompts are left."""
    if hidden.shape[1] > 1:
        found: torch.Tensor = own(hidden, **given)
        return found
    turn = _signed(*given["position_embeddings"])
    return _layer(layer, hidden[:, 0], given["attention_mask"], turn, given["past_key_values"])[:, None]


def _layer(layer: Any, hidden: torch.Tensor, mask: torch.Tensor | None, turn: Turn, cache: Any) -> torch.Tensor:
    """Of tokens that are the next ones of their rows."""
    attention = layer.self_attn
    query, key, value = _projected(attention, _normed(layer.input_layernorm, hidden), turn)
    keys, values = cache.update(key[:, :, None], value[:, :, None], attention.layer_idx)
    # Heads that share keys are tokens of one head here, which sees the same.
    grouped = query.view(len(query), keys.shape[1], -1, query.shape[-1])
    seen = _seen(grouped, keys, values, mask, attention.scaling)
    return _behind(layer, hidden, attention.o_proj(seen.reshape(len(query), -1)))


def _projected(attention: Any, hidden: torch.Tensor, turn: Turn) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries, keys and values: (N, H, D) each. The first two are turned by rotary angles."""
    heads = _heads(attention, hidden)
    shared = heads.shape[1] // (attention.num_key_value_groups + 2)
    both, value = heads[:, :-shared], heads[:, -shared:]
    if hasattr(attention, "q_norm"):
        parts = (attention.q_norm, both[:, :-shared]), (attention.k_norm, both[:, -shared:])
        both = torch.cat([_normed(*part) for part in parts], dim=1)
    turned = torch.addcmul(both * turn[0], both.roll(both.shape[-1] // 2, -1), turn[1])
    return turned[:, :-shared], turned[:, -shared:], value


def _heads(attention: Any, hidden: torch.Tensor) -> torch.Tensor:
    """Of queries, keys and values, in this order."""
    if JOINED in attention.__dict__:
        made = attention.__dict__[JOINED](hidden)
    else:
        made = torch.cat([part(hidden) for part in (attention.q_proj, attention.k_proj, attention.v_proj)], dim=-1)
    return made.view(len(hidden), -1, attention.head_dim)


def _behind(layer: Any, hidden: torch.Tensor, attended: torch.Tensor) -> torch.Tensor:
    """What a layer makes of hidden states and of what its attention adds to them."""
    hidden = hidden + attended
    normed, mlp = _normed(layer.post_attention_layernorm, hidden), layer.mlp
    made: torch.Tensor = mlp.down_proj(mlp.act_fn(mlp.gate_proj(normed)).mul_(mlp.up_proj(normed)))
    return hidden.add_(made)


def _seen(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor | None, scale: float
) -> torch.Tensor:
    """Attention of tokens to all of their rows; a prompt's first token, read alone, comes without a mask.

    On a processor two products take half as long as torch's kernel, which is made for many tokens a row.
    """
    if mask is None or keys.device.type != "cpu" or keys.dtype != torch.float32:
        return scaled_dot_product_attention(query, keys, values, attn_mask=mask, scale=scale)
    of_all = mask.transpose(-1, -2).expand(*keys.shape[:3], query.shape[2]).flatten(0, 1)
    # In this order the keys are read as they lie.
    scores = torch.baddbmm(of_all, keys.flatten(0, 1), query.flatten(0, 1).transpose(1, 2), alpha=scale)
    return torch.bmm(scores.transpose(1, 2).softmax(-1), values.flatten(0, 1))


def _seen_by_prompts(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, grid: Grid, mask: torch.Tensor | None, scale: float
) -> torch.Tensor:
    """Attention of prompts' tokens to what is before them: (N, H * D)."""
    found = scaled_dot_product_attention(
        _in_rows(query, grid),
        keys,
        values,
        attn_mask=mask,
        is_causal=mask is None,
        scale=scale,
        enable_gqa=query.shape[1] != keys.shape[1],
    )
    return found.transpose(1, 2)[grid.row, grid.column].flatten(1)


def _in_rows(heads: torch.Tensor, grid: Grid) -> torch.Tensor:
    """(N, H, D) to (G, H, W, D)."""
    padded = heads.new_zeros(grid.rows, grid.columns, *heads.shape[1:])
    padded[grid.row, grid.column] = heads
    return padded.transpose(1, 2)


def _signed(cos: torch.Tensor, sin: torch.Tensor) -> Turn:
    half = cos.shape[-1] // 2
    return cos, torch.cat([-sin[..., :half], sin[..., half:]], dim=-1)


def _normed(norm: Any, hidden: torch.Tensor) -> torch.Tensor:
    """In two operations instead of eight where halves are: transformers rounds before it multiplies by the weight."""
    if hidden.dtype != norm.weight.dtype:
        found: torch.Tensor = norm(hidden)
        return found
    halves = hidden.dtype != torch.float32
    normed = rms_norm(hidden, hidden.shape[-1:], None if halves else norm.weight, norm.variance_epsilon)
    return norm.weight * normed if halves else normed

"""What decoder layers are made of, and what each part costs: parameters, and numbers that a token keeps.

Names: H hidden width, A heads x head width, K key-value heads x head width, I feed-forward width.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

Settings = Mapping[str, Any]
"""A model's `config.json`, with its family's defaults where it says nothing."""


@dataclass(frozen=True)
class Part:
    """A piece of a model. Pieces add up."""

    linears: tuple[tuple[str, int, int], ...] = ()
    """Linear layers: name, inputs, outputs."""
    other: int = 0
    """All other parameters: biases, norms, convolutions, the stacked weights of experts."""
    wide: int = 0
    """Numbers that a token keeps for the backward pass in fp32 whatever the arithmetic is: those of norms."""
    narrow: int = 0
    """Numbers that a token keeps in the type of the arithmetic."""
    masked: int = 0
    """Numbers more that it keeps where attention has a mask: keys and values, repeated for each head of their group."""
    pairs: int = 0
    """Numbers that each pair of a row's tokens keeps, where attention is written out."""
    cache: int = 0
    """Numbers that a token leaves in the cache of generation."""

    def __add__(self, more: "Part") -> "Part":
        return Part(*(getattr(self, field.name) + getattr(more, field.name) for field in fields(self)))

    @property
    def parameters(self) -> int:
        return self.other + sum(inputs * outputs for _, inputs, outputs in self.linears)


def norm(width: int) -> Part:
    """Root-mean-square norm: it keeps what it is given and what it has normed, before its scale."""
    return Part(other=width, wide=2 * width)


def layer_norm(width: int, bias: bool = True) -> Part:
    """torch's own: it keeps what it is given."""
    return Part(other=width * (1 + bias), wide=width)


def linear(name: str, inputs: int, outputs: int, bias: bool = False) -> Part:
    return Part(((name, inputs, outputs),), other=outputs * bias)


def attention(
    c: Settings, qkv_bias: bool = False, out_bias: bool = False, out: str = "o_proj", gated: bool = False
) -> Part:
    """Grouped-query attention. It keeps its input, queries, keys, values, and what it hands to its last layer.

    ``gated``: each head's queries come with a gate of the same width.
    """
    width, heads = c["hidden_size"], c["num_attention_heads"]
    size = c.get("head_dim") or width // heads
    all_heads, groups = heads * size, c["num_key_value_heads"] * size
    return (
        linear("q_proj", width, all_heads * (1 + gated), qkv_bias)
        + linear("k_proj", width, groups, qkv_bias)
        + linear("v_proj", width, groups, qkv_bias)
        + linear(out, all_heads, width, out_bias)
        + Part(narrow=width + 2 * all_heads + 2 * groups, masked=2 * (all_heads - groups), cache=2 * groups)
    )


def head_norms(c: Settings) -> Part:
    """A norm on each head's queries and one on its keys."""
    size = c.get("head_dim") or c["hidden_size"] // c["num_attention_heads"]
    kept = 2 * size * (c["num_attention_heads"] + c["num_key_value_heads"])
    return Part(other=2 * size, wide=kept)


def feed_forward(width: int, inner: int, bias: bool = False, prefix: str = "") -> Part:
    """Gated: it keeps its input, both projections, the activation and the product."""
    return (
        linear(f"{prefix}gate_proj", width, inner, bias)
        + linear(f"{prefix}up_proj", width, inner, bias)
        + linear(f"{prefix}down_proj", inner, width, bias)
        + Part(narrow=width + 4 * inner)
    )


def experts(width: int, inner: int, count: int, used: int, bias: bool = False, steps: int = 4) -> Part:
    """A router over stacked, gated experts, each perhaps with biases.

    A token keeps what each expert that is used for it was given, and ``steps`` times the inner width of what it made.
    """
    each = 3 * width * inner + (2 * inner + width + 1) * bias
    return Part(other=count * (each + width), narrow=width + used * (2 * width + steps * inner))

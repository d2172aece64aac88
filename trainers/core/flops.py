"""How many floating-point operations a model needs: what MFU (model FLOPs utilisation, PaLM, arXiv:2204.02311) counts."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn

from trainers.core.sharding import whole_shape


@dataclass(frozen=True)
class ModelFlops:
    """A multiplication and an addition are two operations; recomputation and padding do not count.

    Counted are products with weights and causal attention; what grows with the width alone (norms, activations, the
    states of linear attention and state spaces) is left out, as in PaLM's formula.
    """

    body: int
    """Weights that every token is multiplied with."""
    head: int
    """Weights that scored positions alone are multiplied with."""
    trained: float
    """Share of the weights that get gradients: with low-rank adapters nearly none."""
    attention: int
    """Layers times heads times a head's width, of the layers that attend to all that came before."""
    windowed: int = 0
    """The same of the layers that attend to the last ``window`` tokens."""
    window: int = 0

    def forward(self, lengths: Iterable[int], scored: int) -> float:
        """``lengths`` of the sequences in tokens; ``scored`` positions go through the head."""
        lengths = tuple(lengths)
        seen = (
            2.0 * self.attention * sum(n * (n + 1) for n in lengths)
        )  # twice the pairs of a query and a key that it sees
        seen += 2.0 * self.windowed * sum(2 * _pairs(n, self.window) for n in lengths)
        return 2.0 * (self.body * sum(lengths) + self.head * scored) + seen

    def training(self, lengths: Iterable[int], scored: int) -> float:
        """Forward and backward. Going back costs the forward pass for activations, and for trained weights once more."""
        lengths = tuple(lengths)
        weights = 2.0 * (self.body * sum(lengths) + self.head * scored)
        attention = self.forward(lengths, scored) - weights
        return weights * (2.0 + self.trained) + 3.0 * attention


def model_flops(model: Any) -> ModelFlops:
    """Of a transformers model, with or without adapters and a language head."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    head_size = head.weight.numel() if head is not None else 0
    config = model.config.get_text_config()
    active = _active_share(config)
    body = trained = 0
    for module in model.modules():
        if module is head or isinstance(module, nn.Embedding):
            continue
        for name, weight in module.named_parameters(recurse=False):
            if weight.ndim < 2 or name.endswith("bias"):  # experts' biases are stacked too
                continue
            expert = weight.ndim == 3 and not isinstance(module, nn.Conv1d)
            size = int(whole_shape(weight).numel() * (active if expert else 1))
            body += size
            trained += size if weight.requires_grad else 0
    if head is not None and head.weight.requires_grad:
        trained += head_size
    full, windowed = _attention_widths(config)
    window = int(getattr(config, "sliding_window", None) or 0)
    return ModelFlops(body, head_size, trained / max(body + head_size, 1), full, windowed, window)


def _active_share(config: Any) -> float:
    """Share of a layer's experts that a token visits. Experts' weights are stacked: (experts, in, out)."""
    named = (getattr(config, key, None) for key in ("num_local_experts", "num_experts", "n_routed_experts"))
    experts = next(filter(None, named), 1)
    return (getattr(config, "num_experts_per_tok", None) or experts) / experts


def _attention_widths(config: Any) -> tuple[int, int]:
    """Layers times heads times a head's width: of those that attend to everything, and of those with a window."""
    heads = getattr(config, "num_attention_heads", 0)
    width = getattr(config, "head_dim", None) or getattr(config, "hidden_size", 0) // max(heads, 1)
    if getattr(config, "kv_lora_rank", None):  # latent attention: keys are wider than values
        width = (config.qk_nope_head_dim + config.qk_rope_head_dim + config.v_head_dim) / 2
    kinds = _layer_kinds(config)
    windowed = sum("sliding" in kind for kind in kinds)
    full = sum("attention" in kind or kind == "hybrid" for kind in kinds if "linear" not in kind) - windowed
    return int(full * heads * width), int(windowed * heads * width)


def _layer_kinds(config: Any) -> list[str]:
    """One for each layer: which of a hybrid's layers attend, and how far."""
    kinds = getattr(config, "layer_types", None) or getattr(config, "layers_block_type", None)
    every = "sliding_attention" if getattr(config, "sliding_window", None) else "attention"
    return list(kinds) if kinds else [every] * getattr(config, "num_hidden_layers", 0)


def _pairs(length: int, window: int) -> int:
    """Queries and keys within a window: each token sees itself and up to ``window`` - 1 before it."""
    near = min(length, window)
    return near * (near + 1) // 2 + (length - near) * window

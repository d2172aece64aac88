"""A batch of responses on transformers' own cache, for architectures that :mod:`trainers.core.slots` does not know.

State-space models, convolutions and linear attention have states that are no keys and values of positions. Prompts of a
batch start together, padded to the left, and nothing new comes in before all of them have ended.
"""

import inspect
from collections.abc import Sequence as List
from typing import Any

import torch
from transformers.cache_utils import Cache

from trainers.contract import BadInput
from trainers.core.sharding import computes_on


class Padded:
    """Rows on their way."""

    refills = False

    def __init__(self, model: Any, pad_id: int) -> None:
        self.model, self.pad_id = model, pad_id
        # State-space models without attention name it otherwise.
        names = inspect.signature(model.forward).parameters
        self.cache_name = "cache_params" if "cache_params" in names else "past_key_values"

    def fill(self, rows: List[int], prompts: List[list[int]]) -> None:
        """Take prompts, all of them at once. They are read when logits are asked for."""
        assert list(rows) == list(range(len(prompts)))
        width, device = max(map(len, prompts)), computes_on(self.model)
        padded = [[self.pad_id] * (width - len(p)) + list(p) for p in prompts]
        self.unread: torch.Tensor | None = torch.tensor(padded, device=device)
        self.real = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)
        self.cache: Any = None

    def logits(self, tokens: torch.Tensor, positions: torch.Tensor, width: int) -> torch.Tensor:
        """(B, V) of what follows the last token of each row."""
        ids, mask, first = tokens[:, None], None, self.unread is not None
        if self.unread is not None:
            ids, mask, self.unread = self.unread, self.real, None
            positions = (self.real.cumsum(-1) - 1).clamp(min=0)
        else:
            positions = positions[:, None]
            self.real = torch.cat([self.real, self.real.new_ones(len(tokens), 1)], dim=-1)
            if self.cache_name == "past_key_values":  # states alone have no positions for a mask to be of
                mask = self.real
        out = self.model(
            input_ids=ids,
            # Without padding no mask is needed, and building one is a good part of a small model's time per token.
            attention_mask=None if mask is None or bool(mask.all()) else mask,
            position_ids=positions,
            use_cache=True,
            logits_to_keep=1,
            **{self.cache_name: self.cache},
            **without_router_logits(self.model),
        )
        self.cache = getattr(out, self.cache_name, None)
        kind = self.model.config.model_type
        if self.cache is None:
            raise BadInput(f"models of type {kind} cannot generate: their forward pass gives no cache to go on from")
        if first and (own := _own_kind(self.cache)) is not None:
            raise BadInput(
                f"models of type {kind} cannot generate: {own}, a cache of their own, does not keep rows apart as needed"
            )
        logits: torch.Tensor = out.logits[:, -1]
        return logits

    def keep(self, rows: torch.Tensor) -> None:
        """Row i is from now on what row ``rows[i]`` was."""
        if self.cache is not None:
            self.cache.reorder_cache(rows)
        self.real = self.real[rows]


def _own_kind(cache: Any) -> str | None:
    """The part of a cache that is an architecture's own, and of which rows side by side are not what they are alone.

    What MiniMax keeps beside its layers stays behind when a row ends, and its masks miss it; layers of DeepSeek V4 compress
    tokens in windows that begin with the padding. A cache that says itself how rows are taken out is believed.
    """
    if getattr(type(cache), "reorder_cache", None) in (None, Cache.reorder_cache):
        parts = [cache, *getattr(cache, "layers", ())]
        return next((type(part).__name__ for part in parts if type(part).__module__ != Cache.__module__), None)
    return None


def without_router_logits(model: Any) -> dict[str, bool]:
    """With them transformers computes a loss of experts' balance, which fails once there is a cache and a mask."""
    return {"output_router_logits": False} if getattr(model.config, "output_router_logits", False) else {}

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
        ids, mask = tokens[:, None], None
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
        if not _gives_rows(self.cache):
            cache = type(self.cache).__name__
            raise BadInput(f"models of type {kind} cannot generate: no rows can be taken out of their {cache}")
        logits: torch.Tensor = out.logits[:, -1]
        return logits

    def keep(self, rows: torch.Tensor) -> None:
        """Row i is from now on what row ``rows[i]`` was."""
        if self.cache is not None:
            self.cache.reorder_cache(rows)
        self.real = self.real[rows]


def _gives_rows(cache: Any) -> bool:
    """Whether rows can be taken out of a cache: of all of transformers' own kinds, whose layers know how.

    What an architecture adds beside its layers (MiniMax's states) stays behind unless it says so, and masks miss it too.
    """
    kind, general = type(cache), Cache.reorder_cache
    own = getattr(kind, "reorder_cache", None)
    return own is not None and (own is not general or kind.__module__ == Cache.__module__)


def without_router_logits(model: Any) -> dict[str, bool]:
    """With them transformers computes a loss of experts' balance, which fails once there is a cache and a mask."""
    return {"output_router_logits": False} if getattr(model.config, "output_router_logits", False) else {}

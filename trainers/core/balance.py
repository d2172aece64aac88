"""The loss that keeps a mixture's experts evenly used, where a model's config asks for it (`output_router_logits`).

It is the one of the Switch Transformer (Fedus et al. 2022, eq. 4-6) as transformers computes it: all layers' tokens
together. transformers takes all tokens of a forward pass, so that its value depends on which sequences share one. Here
every sequence has its own, and a step's is their mean by tokens, which micro-batches and processes do not change.

Names: S sequences, R rows of L positions, E experts.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch.nn.functional import one_hot

from trainers.contract import BadInput
from trainers.core.batch import Batch

_collected: ContextVar[list[torch.Tensor] | None] = ContextVar("collected", default=None)


@contextmanager
def collected() -> Iterator[list[torch.Tensor]]:
    """A list to which forward passes inside, if they are trained, add their sequences' losses: (S,), coefficient included."""
    found: list[torch.Tensor] = []
    token = _collected.set(found)
    try:
        yield found
    finally:
        _collected.reset(token)


def is_wanted(model: Any) -> bool:
    """Whether the forward pass that comes shall record what routers say."""
    return _collected.get() is not None and torch.is_grad_enabled() and coefficient(model) > 0


def collect(model: Any, router_logits: tuple[torch.Tensor, ...] | None, batch: Batch) -> None:
    """Raises BadInput where the config asks for a loss of routers that do not say anything."""
    found = _collected.get()
    assert found is not None
    if not router_logits:
        raise BadInput(
            f"models of type {model.config.model_type} do not say how tokens are routed: "
            "set output_router_logits to false in the model's config.json"
        )
    found.append(coefficient(model) * balance_losses(router_logits, experts_per_token(model), batch))


def coefficient(model: Any) -> float:
    """Weight of the loss by the model's config; 0 where it asks for none."""
    config = model.config.get_text_config()
    asked = getattr(config, "output_router_logits", False)
    return float(getattr(config, "router_aux_loss_coef", None) or 0.0) if asked else 0.0


def experts_per_token(model: Any) -> int:
    return int(model.config.get_text_config().num_experts_per_tok)


def balance_losses(router_logits: tuple[torch.Tensor, ...], top_k: int, batch: Batch) -> torch.Tensor:
    """E sum_e f_e P_e of every sequence, before the coefficient: (S,) in fp32.

    f_e is the number of visits of expert e by token, P_e the mean of its router probability, both over a sequence's
    tokens in all layers. ``router_logits`` are (R * L, E) from each layer.
    """
    owner = owners(batch)
    visits = probabilities = torch.zeros((), device=owner.device)
    for layer in router_logits:
        shares = layer.reshape(len(owner), -1).softmax(-1)
        chosen = one_hot(shares.topk(top_k, dim=-1).indices, shares.shape[-1]).sum(1)
        visits = visits + _by_owner(chosen.float(), owner, batch.num_sequences)
        probabilities = probabilities + _by_owner(shares.float(), owner, batch.num_sequences)
    tokens = len(router_logits) * token_counts(batch)[:, None]
    experts = router_logits[0].shape[-1]
    return experts * (visits / tokens * (probabilities / tokens)).sum(-1)


def share(collected: list[torch.Tensor], batch: Batch, num_tokens: int) -> torch.Tensor:
    """A forward pass's part of a step's mean by tokens, of which the step has ``num_tokens``: (). 0 for a pass without items."""
    weights = token_counts(batch) / num_tokens if num_tokens else torch.zeros(batch.num_sequences)
    return (torch.stack(collected).sum(0) * weights.to(batch.last_at.device)).sum()


def token_counts(batch: Batch) -> torch.Tensor:
    """Tokens of each sequence, scored or not: (S,)."""
    return torch.bincount(owners(batch), minlength=batch.num_sequences + 1)[:-1]


def owners(batch: Batch) -> torch.Tensor:
    """Index of each position's sequence, S for padding: (R * L,)."""
    ends, order = batch.last_at.sort()
    positions = torch.arange(batch.input_ids.numel(), device=ends.device)
    after = torch.searchsorted(ends, positions).clamp(max=len(ends) - 1)
    width = batch.input_ids.shape[1]
    # Behind a row's last sequence the next end lies in another row, or before the position.
    inside = (ends[after] >= positions) & (ends[after] // width == positions // width)
    return torch.where(inside, order[after], batch.num_sequences)


def _by_owner(values: torch.Tensor, owner: torch.Tensor, count: int) -> torch.Tensor:
    """Sums of (R * L, E) by sequence: (S, E)."""
    return values.new_zeros(count + 1, values.shape[-1]).index_add(0, owner, values)[:-1]

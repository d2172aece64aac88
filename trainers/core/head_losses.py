"""Losses of logits whose gradient is formed in the forward pass, chunk by chunk of the scored positions.

What a loss wants of a position is known as soon as its value is, or those of the item that it belongs to. So a chunk's
logits are turned into their gradient at once, and that into the gradients of hidden states and weights: three products
with the head's matrix, where autograd keeps the logits of all positions or computes them twice. The backward pass only
multiplies what it finds with the derivative of what is made of the loss.

A head is called once, whatever the number of chunks, and its weights are read nowhere else: strategies that split them
over processes gather them around that call.

Names: K scored positions, k of one chunk, V vocabulary, H hidden width.
"""

from collections.abc import Callable, Mapping
from collections.abc import Sequence as List
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from trainers.core import products
from trainers.core.heads import called, fp32_weights, is_plain, product, scaled
from trainers.sizing.at_once import CHUNK_ELEMENTS

LogitsFn = Callable[..., torch.Tensor]
"""Takes the logits of some scored positions, (k, V) in fp32, which ones these are and, of a model :class:`Beside`, its
logits; returns (k,), or (k, n) of which the first is what is trained."""

LossFn = Callable[[torch.Tensor, slice], torch.Tensor]
"""A loss that is a sum over items: takes the trained values of some items' positions, (k,), and which items these are;
returns their part of it, (). Items are positions, or what several positions make together, as a pair of responses does.
"""


@dataclass(frozen=True)
class Beside:
    """Another model whose logits at the same positions are looked at, and get no gradient."""

    model: Any
    hidden: torch.Tensor
    """Its hidden states at the scored positions, (K, H)."""


def head_values(
    model: Any, hidden: torch.Tensor, fn: LogitsFn, sizes: List[int] | None = None, beside: Beside | None = None
) -> torch.Tensor:
    """``fn`` of the logits at all positions, (K, H) to (K,) or (K, n); without gradients.

    With the ``sizes`` of :func:`head_loss` they are the very same numbers: rounding depends on what shares a product.
    """

    def run(hidden: torch.Tensor) -> torch.Tensor:
        head = _Head(model, hidden, fp32_weights(model.get_output_embeddings()))
        chunks = [at for _, found in pieces(sizes, len(hidden), head.room) for at in found]
        return _beside(beside, fn, partial(head.values, chunks))

    with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
        return called(model.get_output_embeddings(), run, hidden.float())


def head_loss(
    model: Any,
    hidden: torch.Tensor,
    fn: LogitsFn,
    loss: LossFn,
    sizes: List[int] | None = None,
    beside: Beside | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss of what ``fn`` makes of the logits, (), and what that is, (K,) or (K, n), without gradients.

    ``sizes`` are the scored positions of each item, which follow one another; None: every position is an item. An
    item's logits are computed once if they fit a chunk, and twice otherwise, because what it wants of its positions is
    known when all of their values are.
    """

    def run(hidden: torch.Tensor) -> Any:
        weights = fp32_weights(model.get_output_embeddings())

        def form(hidden: torch.Tensor, tensors: List[torch.Tensor], wanted: List[bool]) -> _Formed:
            head = _Head(model, hidden, dict(zip(weights, tensors, strict=True)))
            return _beside(beside, fn, partial(_formed, head, loss, sizes, _Gradients(head, wanted)))

        return _WithGradients.apply(form, hidden, *weights.values())

    with torch.autocast(hidden.device.type, enabled=False):
        return called(model.get_output_embeddings(), run, hidden.float())


def pieces(sizes: List[int] | None, count: int, room: int) -> list[tuple[slice, list[slice]]]:
    """Items in runs that fit a chunk of ``room`` positions, each run with its chunks; larger items have several.

    >>> pieces([2, 1, 5], 8, 3)
    [(slice(0, 2, None), [slice(0, 3, None)]), (slice(2, 3, None), [slice(3, 6, None), slice(6, 8, None)])]
    """
    if sizes is None:
        return [(at, [at]) for at in _cut(0, count, room)]
    runs, first, start, end = [], 0, 0, 0
    for index, size in enumerate(sizes):
        if index > first and end + size - start > room:
            runs.append((slice(first, index), _cut(start, end, room)))
            first, start = index, end
        end += size
    return [*runs, (slice(first, len(sizes)), _cut(start, end, room))]


def _cut(start: int, stop: int, size: int) -> list[slice]:
    """Slices of at most ``size``; one that is empty where there is nothing."""
    return [slice(i, min(i + size, stop)) for i in range(start, max(stop, start + 1), size)]


# ---------------------------------------------------------------- within a call of the head

_Formed = tuple[torch.Tensor, torch.Tensor, List[torch.Tensor | None]]
"""Loss (), values (K, ...), and the loss's gradients: of the hidden states, then of each weight."""


class _WithGradients(torch.autograd.Function):
    """A loss that comes with its gradients. They are multiplied in place, so there is one backward pass."""

    @staticmethod
    def forward(ctx: Any, form: Callable[..., _Formed], hidden: torch.Tensor, *weights: torch.Tensor) -> Any:
        loss, values, gradients = form(hidden, weights, ctx.needs_input_grad[1:])
        ctx.save_for_backward(*gradients)
        ctx.mark_non_differentiable(values)
        return loss, values

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: torch.Tensor) -> Any:
        return None, *(None if found is None else found.mul_(upstream[0]) for found in ctx.saved_tensors)


class _Head:
    """A model's head with the hidden states that it is called with, all of them."""

    def __init__(self, model: Any, hidden: torch.Tensor, weights: Mapping[str, torch.Tensor]) -> None:
        self.model = model
        self.module = model.get_output_embeddings()
        self.hidden = hidden
        self.weights = weights
        self.room = max(1, CHUNK_ELEMENTS // self.module.weight.shape[0])

    def logits(self, at: slice) -> torch.Tensor:
        with torch.no_grad():
            return scaled(self.model, product(self.module, self.weights, self.hidden[at]))

    def values(self, chunks: List[slice], fn: LogitsFn) -> torch.Tensor:
        with torch.no_grad():
            return torch.cat([fn(self.logits(at), at) for at in chunks])


def _beside(beside: Beside | None, fn: LogitsFn, work: Callable[[LogitsFn], Any]) -> Any:
    """``work`` with the function of logits; if there is another model, within one call of its head."""
    if beside is None:
        return work(fn)
    module = beside.model.get_output_embeddings()

    def run(hidden: torch.Tensor) -> Any:
        other = _Head(beside.model, hidden, fp32_weights(module))
        return work(lambda logits, at: fn(logits, at, other.logits(at)))

    return called(module, run, beside.hidden.float())


def _formed(head: _Head, loss: LossFn, sizes: List[int] | None, gradients: "_Gradients", fn: LogitsFn) -> _Formed:
    found = [_piece(head, fn, loss, gradients, *piece) for piece in pieces(sizes, len(head.hidden), head.room)]
    parts, values = zip(*found, strict=True)
    return torch.stack(parts).sum(), torch.cat(values), gradients.found


def _piece(
    head: _Head, fn: LogitsFn, loss: LossFn, gradients: "_Gradients", items: slice, chunks: List[slice]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Some items' part of the loss, (), and their values. What is kept of logits is gone when it returns."""
    kept = _Chunk(head, fn, chunks[0]) if len(chunks) == 1 else None
    values = head.values(chunks, fn) if kept is None else kept.values.detach()
    leaf = _trained(values).clone().requires_grad_()
    with torch.enable_grad():
        part = loss(leaf, items)
    (wanted,) = torch.autograd.grad(part, leaf)
    for at, some in zip(chunks, wanted.split([at.stop - at.start for at in chunks]), strict=True):
        gradients.add(kept or _Chunk(head, fn, at), some)
    return part.detach(), values


class _Chunk:
    """Values of some positions, with what autograd needs on the way back to the head's product."""

    def __init__(self, head: _Head, fn: LogitsFn, at: slice) -> None:
        self.at = at
        recorded = not is_plain(head.module)
        with torch.set_grad_enabled(recorded):
            self.hidden = head.hidden[at].detach().requires_grad_(recorded)
            self.product = product(head.module, head.weights, self.hidden)
        with torch.enable_grad():
            self.values = fn(scaled(head.model, self.product.requires_grad_()), at)
            self.trained = _trained(self.values)

    def slope(self, wanted: torch.Tensor) -> torch.Tensor:
        """Gradient of the product, (k, V), from the derivatives of the loss by the trained values, (k,)."""
        return torch.autograd.grad(self.trained, self.product, wanted)[0]


class _Gradients:
    """A loss's gradients of hidden states and weights, to which the chunks' are added."""

    def __init__(self, head: _Head, wanted: List[bool]) -> None:
        self.head = head
        tensors = (head.hidden, *head.weights.values())
        self.found = [torch.zeros_like(t) if is_wanted else None for t, is_wanted in zip(tensors, wanted, strict=True)]

    def add(self, chunk: _Chunk, wanted: torch.Tensor) -> None:
        hidden, *weights = self.found
        some = None if hidden is None else hidden[chunk.at]
        if is_plain(self.head.module):
            self._add_products(chunk.hidden, chunk.slope(wanted), some, *weights)
        else:
            self._add_recorded(chunk, chunk.slope(wanted), [some, *weights])

    def _add_products(
        self,
        inputs: torch.Tensor,
        slope: torch.Tensor,
        hidden: torch.Tensor | None,
        weight: torch.Tensor | None,
        bias: torch.Tensor | None = None,
    ) -> None:
        """The weight's grows in place: one tensor for all chunks."""
        if hidden is not None:
            hidden.copy_(products.product(slope, self.head.weights["weight"]))
        if weight is not None:
            products.add_gradient(weight, slope, inputs)
        if bias is not None:
            bias += slope.sum(0)

    def _add_recorded(self, chunk: _Chunk, slope: torch.Tensor, gradients: List[torch.Tensor | None]) -> None:
        """Of heads that are more than a product, by autograd."""
        tensors = (chunk.hidden, *self.head.weights.values())
        wanted = [(t, g) for t, g in zip(tensors, gradients, strict=True) if g is not None]
        for (_, gradient), more in zip(
            wanted, torch.autograd.grad(chunk.product, [t for t, _ in wanted], slope), strict=True
        ):
            gradient.add_(more)


def _trained(values: torch.Tensor) -> torch.Tensor:
    return values if values.ndim == 1 else values[:, 0]

"""What a step is: forward and backward over some items, shared by all ranks, as one sum.

Here, and nowhere else, items are planned over ranks and forward passes, precision is chosen, gradients are exchanged,
and sums are reduced. What is summed is the phase's: a function of one forward pass's items and tensors.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import nn

from trainers.contract import Diverged
from trainers.core import balance
from trainers.core.batch import Batch, Packing, Sequence, collate, plan_micro_batches
from trainers.core.context import PhaseContext
from trainers.core.flops import ModelFlops
from trainers.core.parallel import Workers
from trainers.core.shares import in_order
from trainers.core.trainee import Trainee, seed_step

Item = TypeVar("Item")
T = TypeVar("T")

Measures = dict[str, torch.Tensor]
"""Numbers by name, each one forward pass's part of a sum over all ranks and passes: ()."""


@dataclass(frozen=True)
class Layout(Generic[Item]):
    """How items become forward passes. None of it changes a sum."""

    sequences: Callable[[Item], list[Sequence]]
    """An item's sequences, which stay together."""
    max_tokens: int
    """Of one forward pass on one device."""
    packing: bool | Packing

    def plan(self, workers: Workers, items: list[Item], flops: ModelFlops | None = None) -> list[list[int]]:
        """This rank's forward passes as indices of items, perhaps none; every rank has the same number of passes.

        Ranks get equal numbers of a model's operations, or without ``flops`` of tokens.
        """
        lengths = [[len(sequence) for sequence in self.sequences(item)] for item in items]
        costs = None if flops is None else [_operations(flops, self.sequences(item)) for item in items]
        return plan_micro_batches(lengths, self.max_tokens, self.packing, workers.world, costs)[workers.rank]

    def collate(self, items: list[Item], device: torch.device) -> Batch:
        """The items' sequences, item by item. Without items it is one token that is not scored."""
        return collate([sequence for item in items for sequence in self.sequences(item)], self.packing, device)


def accumulate(
    ctx: PhaseContext,
    trainee: Trainee,
    layout: Layout[Item],
    step: int,
    items: list[Item],
    terms: Callable[[list[Item], Batch], tuple[torch.Tensor, Measures]],
    counted: bool = True,
) -> dict[str, float]:
    """Gradients of a step's loss, added to the trainee's; returns the loss and the measures, the same on all ranks.

    ``terms`` takes the items of one forward pass and their batch, and returns its part of the loss, (), and of the
    measures. A rank may have a pass without items: its loss is a sum of nothing that still reaches every weight,
    because all ranks take part in all exchanges. Where a mixture of experts asks for it, its balance loss is added, and
    is a measure of its own. Not ``counted`` are items that another trainee's pass has counted: only
    the operations are added to the meter. Raises Diverged if a sum is not finite.
    """
    with ctx.meter.part("data"):
        passes = layout.plan(ctx.workers, items, trainee.flops)
        num_tokens = sum(len(sequence) for item in items for sequence in layout.sequences(item))
    seed_step(ctx.seed, step, ctx.workers.rank)
    sums: Measures = {}
    for i, chosen in enumerate(passes):
        with ctx.meter.part("forward_backward"), trainee.engine.exchange(last=i == len(passes) - 1):
            some = [items[j] for j in chosen]
            batch = layout.collate(some, ctx.workers.device)
            with ctx.workers.autocast(), balance.collected() as uneven:
                loss, measures = terms(some, batch)
            if uneven:
                measures = {**measures, "balance_loss": balance.share(uneven, batch, num_tokens if some else 0)}
            trainee.engine.backward(loss + measures.get("balance_loss", 0))
            _add(sums, {"loss": loss, **measures})
        _count(ctx, trainee, layout, some, counted)
    return _finite(_reduced(ctx.workers, sums), step)


@torch.no_grad()
def measured(
    ctx: PhaseContext,
    module: nn.Module,
    layout: Layout[Item],
    items: list[Item],
    measure: Callable[[list[Item], Batch], Measures],
) -> dict[str, float]:
    """Sums of measures over all items, without gradients and in eval mode, the same on all ranks."""
    sums: Measures = {}
    with in_eval_mode(module), ctx.workers.autocast():
        for chosen in layout.plan(ctx.workers, items):
            some = [items[j] for j in chosen]
            _add(sums, measure(some, layout.collate(some, ctx.workers.device)))
    return _reduced(ctx.workers, sums)


@torch.no_grad()
def scored(
    workers: Workers,
    layout: Layout[Item],
    items: list[Item],
    score: Callable[[list[Item], Batch], list[T]],
) -> list[T]:
    """One result for each item, in order and the same on all ranks.

    ``score`` takes the items of one forward pass and their batch, and returns a result for each item. All ranks run
    the same number of passes, so a model that is split over ranks can score too; a pass may have no items.
    """
    mine: list[int] = []
    found: list[T] = []
    for chosen in layout.plan(workers, items):
        some = [items[j] for j in chosen]
        with workers.autocast():
            found += score(some, layout.collate(some, workers.device))
        mine += chosen
    return in_order(workers, mine, found)


@contextmanager
def in_eval_mode(*modules: nn.Module) -> Iterator[None]:
    """Without dropout; afterwards each module is in the mode it was in."""
    before = [module.training for module in modules]
    for module in modules:
        module.eval()
    try:
        yield
    finally:
        for module, training in zip(modules, before, strict=True):
            module.train(training)


def _add(sums: Measures, measures: Measures) -> None:
    for name, value in measures.items():
        sums[name] = sums.get(name, 0) + value.detach().double()


def _reduced(workers: Workers, sums: Measures) -> dict[str, float]:
    """One exchange for all of them. Every rank has a pass, so every rank has the same names."""
    if not sums:
        return {}
    return dict(zip(sums, workers.sum(torch.stack(list(sums.values()))).tolist(), strict=True))


def _finite(sums: dict[str, float], step: int) -> dict[str, float]:
    for name, value in sums.items():
        if not math.isfinite(value):
            raise Diverged(f"step {step + 1}: {name} is {value}; try a lower learning rate")
    return sums


def _count(ctx: PhaseContext, trainee: Trainee, layout: Layout[Item], items: list[Item], counted: bool) -> None:
    sequences = [sequence for item in items for sequence in layout.sequences(item)]
    tokens = sum(len(sequence) for sequence in sequences)
    ctx.meter.count(*(tokens, len(items)) if counted else (0, 0), _operations(trainee.flops, sequences))


def _operations(flops: ModelFlops, sequences: list[Sequence]) -> float:
    """Of a training step's forward and backward of these sequences."""
    return flops.training((len(sequence) for sequence in sequences), sum(s.num_scored for s in sequences))

"""Rows shared over ranks: everyone does a part, and everyone gets all results in order."""

from collections.abc import Callable
from collections.abc import Sequence as List
from typing import Any, TypeVar

from trainers.core.parallel import Workers

T = TypeVar("T")


def over_ranks(workers: Workers, count: int, work: Callable[[List[int]], list[T]]) -> list[T]:
    """Results for the rows 0..count-1, in order and the same on all ranks.

    ``work`` gets the indices of this rank's rows, perhaps none, and returns one result for each. It must not wait for
    other ranks, which have other numbers of rows.
    """
    mine = range(count)[workers.rank :: workers.world]
    return in_order(workers, mine, work(mine))


def in_order(workers: Workers, mine: List[int], results: List[T]) -> list[T]:
    """All ranks' results by index, everywhere; ``results[k]`` belongs to row ``mine[k]``, and every row has one rank."""
    found: Any = workers.gather_objects(list(zip(mine, results, strict=True)))
    return [result for _, result in sorted(found, key=lambda pair: pair[0])]

"""Seeded synthetic data sets, so that a whole alignment run needs no download.

A task is a module with a ``SPLITS`` mapping (split name -> function drawing one row) and a
``gold_reward``. This package imports neither torch nor transformers: reading rows is instant.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

from trainers.synthetic import letters


class Task(Protocol):
    """What a task module offers; modules satisfy it structurally."""

    @property
    def SPLITS(self) -> Mapping[str, Callable[[random.Random], dict[str, Any]]]: ...  # noqa: N802 - a constant

    def gold_reward(self, row: Mapping[str, Any], response: str) -> float: ...


TASKS: dict[str, Task] = {"letters": letters}


def generate(task: str, split: str, count: int, seed: int) -> Iterator[dict[str, Any]]:
    """Yield `count` rows of a split; equal arguments give equal rows on every Python version.

    A smaller count gives a prefix of a larger one, so data can be grown without changing what a
    model has already seen. Names are checked at the call, not at the first row.
    """
    if task not in TASKS:
        raise ValueError(f"unknown synthetic task {task!r}; known tasks: {', '.join(TASKS)}")
    splits = TASKS[task].SPLITS
    if split not in splits:
        raise ValueError(f"synthetic task {task!r} has no split {split!r}; known splits: {', '.join(splits)}")
    if count < 0:
        raise ValueError(f"count must not be negative, got {count}")
    # Seeding by text keeps the streams of different splits independent under one seed.
    rng = random.Random(f"{task}/{split}/{seed}")
    return (splits[split](rng) for _ in range(count))


__all__ = ["TASKS", "Task", "generate"]

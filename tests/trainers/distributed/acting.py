"""What a test does within a phase's loop: the one place where tests reach into it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

from trainers.core.checkpoint import Checkpoints
from trainers.core.context import PhaseContext


@contextmanager
def after_steps(act: Callable[[int, int, PhaseContext], None]) -> Iterator[None]:
    """Inside, ``act(step, total, ctx)`` is called whenever a phase has finished a step, before anything of that is saved."""
    after_step = Checkpoints.after_step

    def acting(self: Checkpoints, step: int, total: int, *args: Any, **kwargs: Any) -> None:
        act(step, total, self.ctx)
        after_step(self, step, total, *args, **kwargs)

    with patch.object(Checkpoints, "after_step", acting):
        yield

"""How far apart may be what two ways of sharing the work have made of one phase."""

from pathlib import Path

import pytest
from distributed.cells import Way
from distributed.compare import difference, losses

BOUND = 1e-5
"""Relative, in fp32. Sums that are split otherwise round otherwise."""

BF16_LOSS, BF16_WEIGHTS = 2e-2, 2e-2
"""Of losses, and relative of all weights together, after four steps of arithmetic in bf16."""


def agree(way: Way, kind: str, found: Path, expected: Path) -> None:
    """Fails unless losses of all steps and final weights are those of another run, as far as arithmetic allows."""
    if way.bf16:
        _agree_in_bf16(kind, found, expected)
        return
    assert losses(found) == pytest.approx(losses(expected), rel=BOUND, abs=1e-6), kind
    if (found / "model").exists():
        assert difference(found, expected) < BOUND, kind


def _agree_in_bf16(kind: str, found: Path, expected: Path) -> None:
    """Where phases sample, a response that rounds otherwise is another one: their first loss is the same."""
    steps = 1 if kind in ("ppo", "distill") else 4
    ours, theirs = ([loss for _, loss in sorted(losses(run).items())][:steps] for run in (found, expected))
    assert ours == pytest.approx(theirs, rel=BF16_LOSS, abs=BF16_LOSS), kind
    if steps > 1:
        assert difference(found, expected) < BF16_WEIGHTS, kind

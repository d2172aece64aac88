"""One trajectory: every way of sharing the work gives what one process does, phase by phase."""

import json
from pathlib import Path

import pytest
import torch
from distributed.cells import WAYS
from safetensors.torch import load_file

REDUCED = {"fsdp", "fsdp, hybrid"}
"""Ways that are tried always; the others with ``make test-distributed``."""

BOUND = 1e-5
"""Relative, in fp32. Sums that are split otherwise round otherwise."""


@pytest.mark.parametrize("name", [pytest.param(n, marks=[] if n in REDUCED else pytest.mark.distributed) for n in WAYS])
def test_every_phase_is_what_one_process_makes_of_it(name, run_way, in_one_process, tmp_path):
    ours, theirs = run_way(WAYS[name], tmp_path), in_one_process(WAYS[name].changes)
    for kind, found in ours.items():
        assert_same_losses(found, theirs[kind], kind)
        assert_same_metrics(found, theirs[kind], kind)
        if (found / "model").exists():
            assert difference(found, theirs[kind]) < BOUND, kind
    assert answers(ours["rollout"]) == answers(theirs["rollout"])


def assert_same_losses(found: Path, expected: Path, kind: str) -> None:
    ours, theirs = losses(found), losses(expected)
    assert ours == pytest.approx(theirs, rel=BOUND, abs=1e-6), kind


def losses(phase: Path) -> list[float]:
    lines = map(json.loads, (phase / "metrics.jsonl").read_text().splitlines())
    return [line["loss"] for line in lines if "loss" in line]


def assert_same_metrics(found: Path, expected: Path, kind: str) -> None:
    ours, theirs = (json.loads((phase / "result.json").read_text())["metrics"] for phase in (found, expected))
    assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-5), kind


def difference(found: Path, expected: Path) -> float:
    """Relative, of all weights together: where a gradient is all but nothing, Adam makes a step of its rounding."""
    ours, theirs = (load_file(phase / "model" / "model.safetensors") for phase in (found, expected))
    assert ours.keys() == theirs.keys()
    squares = torch.tensor([[(ours[n] - w).square().sum(), w.square().sum()] for n, w in theirs.items()]).double()
    return float((squares[:, 0].sum() / squares[:, 1].sum()).sqrt())


def answers(phase: Path) -> list[str]:
    return [json.loads(line)["teacher_response"] for line in (phase / "traces.jsonl").read_text().splitlines()]

"""Whole phases with layers as torch.compile and g++ make them, beside the same phases without: ``make test-compiled``.

Prints of each how far losses are apart, how many programs were made, and steps and processor time a second.
"""

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from distributed.cells import LORA, Way, phases
from finished import lines
from test_compiling import counted

pytestmark = pytest.mark.compiled

BOUND = 1e-5
"""Relative, in fp32. What is fused rounds otherwise."""
PROGRAMS = 12
"""That one phase may make: of each of its models with and without gradients, with and without a mask, and for one row."""


@dataclass(frozen=True)
class Cell:
    kind: str = "sft"
    parallel: dict[str, Any] = field(default_factory=dict)
    changes: dict[str, Any] = field(default_factory=dict)


CELLS = {kind: Cell(kind) for kind in ("sft", "reward", "dpo", "ppo", "distill")} | {
    "sft, adapters": Cell(changes={"lora": LORA}),
    "sft, checkpointed": Cell(parallel={"gradientCheckpointing": True}),
}
SPLIT = {
    "ddp": {"strategy": "ddp"},
    "ddp, checkpointed": {"strategy": "ddp", "gradientCheckpointing": True},
    "fsdp": {"strategy": "fsdp", "gradientCheckpointing": True},
    "zero 2": {"strategy": "deepspeed"},
}


@pytest.mark.parametrize("name", CELLS)
def test_losses_are_those_of_plain_layers_and_programs_are_few(
    name, run_phase, tiny_model_dir, tiny_reward_dir, tmp_path
):
    cell = CELLS[name]
    spec = phases(tiny_model_dir, tiny_reward_dir, [cell.kind])[cell.kind] | cell.changes
    found = {}
    for compiled in (False, True):
        counters = counted()
        output = tmp_path / str(compiled) / "run" / "phase"
        parallel = {"microBatchTokens": 128, "compile": compiled} | cell.parallel
        begin = time.process_time()
        assert run_phase(cell.kind, spec | {"parallel": parallel}, None, output)[0] == 0
        found[compiled] = losses(output), time.process_time() - begin, counters["stats"]["unique_graphs"]
    (plain, before, _), (ours, after, made) = found[False], found[True]
    print(f"{name}: losses {apart(ours, plain):.1e} apart, {made} programs, {after:.0f} CPU-s instead of {before:.0f}")
    assert apart(ours, plain) < BOUND
    assert 0 < made <= PROGRAMS
    assert not counters["graph_break"]


@pytest.mark.parametrize("name", SPLIT)
def test_so_are_those_of_several_processes(name, run_way):
    way = Way(SPLIT[name] | {"compile": True})
    ours, plain = (losses(run_way(each, ["sft"])["sft"]) for each in (way, way.alone))
    print(f"{name}: losses {apart(ours, plain):.1e} apart")
    assert apart(ours, plain) < BOUND


def losses(phase: Path) -> list[float]:
    return [line["loss"] for line in lines(phase, "loss")]


def apart(ours: list[float], theirs: list[float]) -> float:
    """The largest relative difference. A divergence of models that are all but one is a difference of larger numbers."""
    return max(abs(a - b) / max(abs(b), 1e-2) for a, b in zip(ours, theirs, strict=True))

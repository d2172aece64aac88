"""What two runs of a phase have left, side by side."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file


def lines_of(phase: Path) -> list[dict[str, float]]:
    """What was measured, step by step, and when."""
    return [json.loads(line) for line in (phase / "metrics.jsonl").read_text().splitlines() if line.endswith("}")]


def losses(phase: Path) -> dict[float, float]:
    """By step."""
    return {line["step"]: line["loss"] for line in lines_of(phase) if "loss" in line}


def final_metrics(phase: Path) -> dict[str, float]:
    return json.loads((phase / "result.json").read_text())["metrics"]


def difference(found: Path, expected: Path) -> float:
    """Relative, of all weights together: where a gradient is all but nothing, Adam makes a step of its rounding."""
    ours, theirs = (load_file(phase / "model" / "model.safetensors") for phase in (found, expected))
    assert ours.keys() == theirs.keys()
    squares = torch.tensor([[(ours[n] - w).square().sum(), w.square().sum()] for n, w in theirs.items()]).double()
    return float((squares[:, 0].sum() / squares[:, 1].sum()).sqrt())


def exported(folder: Path) -> dict[str, bytes]:
    """A model's files by name."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def answers(phase: Path) -> list[str]:
    return [json.loads(line)["teacher_response"] for line in (phase / "traces.jsonl").read_text().splitlines()]

"""What a finished phase has left in its directory."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file


def lines(phase: Path, key: str | None = None) -> list[dict[str, Any]]:
    """Of metrics.jsonl, all of them or those that have a key."""
    read = [json.loads(line) for line in (phase / "metrics.jsonl").read_text().splitlines()]
    return [line for line in read if key is None or key in line]


def weights(phase: Path) -> dict[str, torch.Tensor]:
    return load_file(phase / "model" / "model.safetensors")


def difference(ours: Mapping[str, torch.Tensor], theirs: Mapping[str, torch.Tensor]) -> float:
    """The largest, of all weights."""
    assert ours.keys() == theirs.keys()
    return max((ours[name].float() - theirs[name].float()).abs().max().item() for name in ours)


def assert_same(ours: Mapping[str, torch.Tensor], theirs: Mapping[str, torch.Tensor], tolerance: float = 0.0) -> None:
    found = difference(ours, theirs)
    assert found <= tolerance, f"weights differ by {found}"

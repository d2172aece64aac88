"""Phases spread over processes, all of a way's in the same ones; and the same phases in one process, to compare with."""

from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import pytest
import yaml
from distributed.cells import KINDS, TRAINED, Way, phases
from distributed.processes import run_phases, succeed


@pytest.fixture(scope="session")
def phase_files(tiny_model_dir: Path, tiny_reward_dir: Path) -> Callable[..., list[tuple[str, Path]]]:
    """``phase_files(way, folder, kinds)``: types and phase files; output is where :func:`output_of` says."""

    def write_all(way: Way, folder: Path, kinds: Collection[str] = KINDS) -> list[tuple[str, Path]]:
        found = []
        for kind, spec in phases(tiny_model_dir, tiny_reward_dir, kinds).items():
            made = [name for name in TRAINED if name in kinds]
            inputs = {name: {"path": str(output_of(folder, name)), "digest": name} for name in made}
            path, output = folder / f"{kind}.yaml", output_of(folder, kind)
            write(path, output, way.document(kind, spec), inputs if kind == "package" else {})
            found.append((kind, path))
        return found

    return write_all


@pytest.fixture(scope="session")
def run_way(
    phase_files: Callable[..., list[tuple[str, Path]]], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., dict[str, Path]]:
    """``run_way(way, kinds) -> {type: the phase's directory}``, made once; fails with the output unless all succeed."""
    made: list[tuple[Way, dict[str, Path]]] = []

    def run(way: Way, kinds: Collection[str] = KINDS) -> dict[str, Path]:
        found = next((phases for done, phases in made if done == way and phases.keys() >= set(kinds)), None)
        if found is None:
            folder = tmp_path_factory.mktemp("way")
            files = phase_files(way, folder, kinds)
            succeed(way, run_phases, files, log=folder / "log")
            found = {kind: output_of(folder, kind) for kind in kinds}
            made.append((way, found))
        return {kind: found[kind] for kind in kinds}

    return run


def output_of(folder: Path, kind: str) -> Path:
    return folder / kind / "run" / kind


def write(path: Path, output: Path, spec: dict[str, Any], inputs: dict[str, Any] | None = None) -> Path:
    """A phase file."""
    output.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump({"output": str(output), "inputs": inputs or {}, "spec": spec}))
    return path

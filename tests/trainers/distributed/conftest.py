"""Phases by torchrun, all of a way's in the same processes; and the same phases in one process, to compare with."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from distributed.cells import Way, phases

RunWay = Callable[[Way, Path], dict[str, Path]]
SCRIPT = Path(__file__).with_name("processes.py")
SECONDS = 600
"""That all of a way's phases may take on a busy machine."""

TRAINED = {"sft", "reward", "dpo", "ppo", "distill"}


@pytest.fixture(scope="session")
def run_way(tiny_model_dir: Path, tiny_reward_dir: Path) -> RunWay:
    """``run_way(way, folder) -> {type: the phase's directory}``; fails with the output unless all of them succeed."""

    def run(way: Way, folder: Path) -> dict[str, Path]:
        found, arguments = {}, []
        for kind, spec in phases(tiny_model_dir, tiny_reward_dir).items():
            found[kind] = folder / kind / "run" / "phase"
            more = way.changes if kind in TRAINED else {}
            parallel = {"microBatchTokens": 128} | way.parallel
            arguments.append(
                f"{kind}={write(folder / f'{kind}.yaml', found[kind], spec | more | {'parallel': parallel})}"
            )
        codes = torchrun([str(SCRIPT), *arguments], way.processes, way.nodes, folder)
        assert not any(codes), "\n".join(path.read_text()[-4000:] for path in folder.glob("node-*.log"))
        return found

    return run


@pytest.fixture(scope="session")
def in_one_process(
    run_way: RunWay, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[dict[str, Any]], dict[str, Path]]:
    """The phases' directories of a run in one process with these changes; each set of changes is run once."""
    made: dict[str, dict[str, Path]] = {}

    def run(changes: dict[str, Any]) -> dict[str, Path]:
        key = json.dumps(changes)
        if key not in made:
            way = Way({"strategy": "single"}, processes=1, changes=changes)
            made[key] = run_way(way, tmp_path_factory.mktemp("one"))
        return made[key]

    return run


def write(path: Path, output: Path, spec: dict[str, Any]) -> Path:
    """A phase file."""
    output.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump({"output": str(output), "inputs": {}, "spec": spec}))
    return path


def torchrun(arguments: list[str], processes: int, nodes: int, folder: Path) -> list[int]:
    """Exit codes of the nodes' launchers; what they print is in ``folder``."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | {"ALIGNMENT_METRICS_PORT": "0", "OMP_NUM_THREADS": "1"}
    launcher = [sys.executable, "-m", "torch.distributed.run", f"--nnodes={nodes}", "--master-addr=127.0.0.1"]
    launcher += [f"--nproc-per-node={processes // nodes}", f"--master-port={port}"]
    started = []
    for node in range(nodes):
        with (folder / f"node-{node}.log").open("w") as log:
            command = [*launcher, f"--node-rank={node}", *arguments]
            started.append(subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT))
    try:
        return [process.wait(SECONDS) for process in started]
    finally:
        for process in started:
            process.kill()

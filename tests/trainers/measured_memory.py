"""Phases in processes of their own, and the memory that they reach."""

import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import yaml

# Large tensors are given back as soon as they are freed, as a device's allocator has them for others at once.
MALLOC = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}


@dataclass(frozen=True)
class Reached:
    """Resident bytes of the largest of a phase's processes."""

    peak: int
    """At its worst moment, be that in a step or not."""
    between: int
    """After the first step: without what imports and exports have for a moment."""


def reached(kind: str, spec: dict[str, Any], folder: Path, processes: int = 1) -> Reached:
    """What a phase reaches. Raises RuntimeError if it fails.

    Weights that nothing has written to are pages of their file, so what is mapped of files counts too.
    """
    folder.mkdir(parents=True)
    file = folder / "phase.yaml"
    file.write_text(yaml.safe_dump({"output": str(folder / "out" / "phase"), "inputs": {}, "spec": spec}))
    command = [*_launcher(processes), "-m", "trainers", kind, "--spec", str(file)]
    environment = {**os.environ, **MALLOC, "OMP_NUM_THREADS": "1", "ALIGNMENT_METRICS_PORT": "0"}
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)
        found = _watch(process, processes, folder / "out" / "phase" / "metrics.jsonl")
    if process.returncode != 0:
        raise RuntimeError((folder / "log").read_text()[-4000:])
    return found


def _launcher(processes: int) -> list[str]:
    if processes == 1:
        return [sys.executable]
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]


def _watch(process: "subprocess.Popen[bytes]", processes: int, metrics: Path) -> Reached:
    """The kernel keeps the peak, so it is enough to ask for it now and then."""
    peak, between, ranks = 0, 0, [process.pid] if processes == 1 else []
    while process.poll() is None:
        ranks = ranks if len(ranks) == processes else _ranks(process.pid)
        peak = max([peak, *(_resident(pid, "VmHWM") for pid in ranks)])
        if not between and metrics.exists():
            between = max(_resident(pid, "VmRSS") for pid in ranks)
        time.sleep(0.02)
    return Reached(peak, between)


def _ranks(launcher: int) -> list[int]:
    try:
        return [child.pid for child in psutil.Process(launcher).children() if "trainers" in child.cmdline()]
    except psutil.NoSuchProcess:
        return []


def _resident(pid: int, which: str) -> int:
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith(which)), 0)

"""Phases in processes of their own, and the memory that they reach.

Processes are forked from one that has imported what phases need, which else would take most of the time.
"""

import multiprocessing
import multiprocessing.forkserver
import os
import signal
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any
from unittest.mock import patch

import yaml

IMPORTED = [
    "trainers.launch",
    "trainers.core.context",
    "trainers.core.parallel",
    "transformers.models.llama.modeling_llama",
    "peft",
    *(f"trainers.phases.{name}.train" for name in ("sft", "reward", "dpo", "ppo", "distill")),
    *(f"trainers.phases.{name}.run" for name in ("rollout", "evaluate")),
]
"""All but DeepSpeed, which phases without it keep from being imported."""

# Large tensors are given back as soon as they are freed, as a device's allocator has them for others at once.
MALLOC = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}


STEPS = 2
"""After which a training phase saves what it has."""


@dataclass(frozen=True)
class Reached:
    """Resident bytes of the largest of a phase's processes."""

    peak: int
    """At its worst moment up to the end of its second step: checkpoints and models pass through the machine's memory."""
    settled: int
    """From the first step on, without what imports and loading have for a moment."""


@contextmanager
def prepared_process() -> Iterator[None]:
    """Inside, a process stands by that has imported what phases need.

    It is one of its own: one that other tests have started was started without the settings of memory.
    """
    server = multiprocessing.forkserver.ForkServer()
    server.set_forkserver_preload(IMPORTED)
    settings = MALLOC | {"OMP_NUM_THREADS": "1", "ALIGNMENT_METRICS_PORT": "0"}
    connect = patch.object(multiprocessing.forkserver, "connect_to_new_process", server.connect_to_new_process)
    with patch.dict(os.environ, settings), connect:
        yield
    # By itself it ends once nobody holds the other end of its pipe, and processes that tests have forked since then do.
    os.kill(server._forkserver_pid, signal.SIGKILL)
    server._stop()


def reached(kind: str, spec: dict[str, Any], folder: Path, processes: int = 1) -> Reached:
    """What a phase reaches, within :func:`prepared_process`. Raises RuntimeError if it fails.

    Weights that nothing has written to are pages of their file, so what is mapped of files counts too.
    """
    folder.mkdir(parents=True)
    file, log = folder / "phase.yaml", folder / "log"
    file.write_text(yaml.safe_dump({"output": str(folder / "out" / "phase"), "inputs": {}, "spec": spec}))
    context = multiprocessing.get_context("forkserver")
    group = _group(processes)
    ranks = [context.Process(target=_run, args=(kind, file, log, group, rank)) for rank in range(processes)]
    for rank in ranks:
        rank.start()
    found = _watch(ranks, folder / "out" / "phase" / "metrics.jsonl")
    if any(rank.exitcode for rank in ranks):
        raise RuntimeError(log.read_text()[-4000:])
    return found


def _group(processes: int) -> dict[str, str]:
    """What torchrun would tell all ranks; nothing to one alone."""
    if processes == 1:
        return {}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    size = str(processes)
    return {"WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}


def _run(kind: str, file: Path, log: Path, group: dict[str, str], rank: int) -> None:
    """One rank, in its process."""
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    if group:
        os.environ |= group | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    from trainers.launch import run_phase

    sys.exit(run_phase(kind, file, []))


def _watch(ranks: list[BaseProcess], metrics: Path) -> Reached:
    """The kernel keeps the peak, so it is enough to ask for it now and then."""
    peak, settled, failed = 0, 0, False
    while any(rank.is_alive() for rank in ranks):
        highest = [_resident(rank.pid, "VmHWM") for rank in ranks]
        steps = metrics.read_bytes().count(b"\n") if metrics.exists() else 0
        if steps < STEPS:
            peak = max([peak, *highest])
        if steps:
            settled = max([settled, *(_resident(rank.pid, "VmRSS") for rank in ranks)])
        if not failed and any(rank.exitcode for rank in ranks):
            failed = True
            for rank in ranks:
                rank.terminate()
        time.sleep(0.02)
    for rank in ranks:
        rank.join()
    return Reached(peak, settled or peak)


def _resident(pid: int | None, which: str) -> int:
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith(which)), 0)

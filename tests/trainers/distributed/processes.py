"""Processes that are forked from one that has imported torch: a start of torch costs six processor seconds, a fork a tenth.

They are told what torchrun would tell them. How processes that torchrun starts end is in test_death.py.
"""

import multiprocessing
import multiprocessing.forkserver
import os
import socket
import sys
from collections.abc import Callable, Sequence
from functools import cache
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
from distributed.cells import Way

from trainers.ending import exit_with

FORKS = multiprocessing.get_context("forkserver")
SECONDS = 900
"""That processes may take on a busy machine."""

Phases = Sequence[tuple[str, Path]]
"""Types and phase files."""


def start(way: Way, work: Callable[..., int | None], *arguments: Any, log: Path) -> list[BaseProcess]:
    """A way's ranks, which exit with what ``work(*arguments)`` returns; what they print is in ``log``."""
    _start_server()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    local = way.processes // way.nodes
    ranks = []
    for rank in range(way.processes):
        places = {"RANK": rank, "LOCAL_RANK": rank % local, "WORLD_SIZE": way.processes, "LOCAL_WORLD_SIZE": local}
        places |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "GLOO_SOCKET_IFNAME": "lo"}
        told = {name: str(value) for name, value in places.items()} if way.processes > 1 else {}
        zero = way.parallel["strategy"] == "deepspeed"
        ranks.append(FORKS.Process(target=_rank, args=(work, arguments, {**os.environ, **told}, zero, log)))
    for process in ranks:
        process.start()
    return ranks


@cache
def _start_server() -> None:
    multiprocessing.forkserver.set_forkserver_preload([f"{__package__}.preloaded"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
        patch.setenv("DS_ACCELERATOR", "cpu")
        multiprocessing.forkserver.ensure_running()


def succeed(way: Way, work: Callable[..., int | None], *arguments: Any, log: Path) -> None:
    """Let a way's ranks do their work; fails with what they print."""
    codes = finish(start(way, work, *arguments, log=log))
    assert codes == [0] * way.processes, f"{codes}\n{log.read_text()[-6000:]}"


def finish(ranks: Sequence[BaseProcess], seconds: float = SECONDS) -> list[int | None]:
    """Exit codes, or signals with a minus; None of one that does not end by itself in time."""
    for process in ranks:
        process.join(seconds)
    codes = [process.exitcode for process in ranks]
    for process in ranks:
        process.kill()
    return codes


def _rank(
    work: Callable[..., int], arguments: Sequence[Any], environment: dict[str, str], zero: bool, log: Path
) -> None:
    import torch
    from distributed.preloaded import DEEPSPEED

    sys.modules.update(DEEPSPEED if zero else {})
    with log.open("a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ.clear()  # the server's is of when it was started
    os.environ |= {"DS_ACCELERATOR": "cpu", **environment, "ALIGNMENT_METRICS_PORT": "0", "OMP_NUM_THREADS": "1"}
    torch.set_num_threads(1)
    exit_with(lambda: work(*arguments))


def run_phases(files: Phases) -> int:
    """Phases one after the other in the same processes, up to the first that fails. Returns its exit code."""
    from trainers import launch

    for kind, path in files:
        if code := launch.run_phase(kind, path, []):
            return code  # the others wait for this one: nothing that follows can run
    return 0

"""A process that has imported what phases import, and forks one for each: ``python -m trainers.warm SOCKET``.

Importing torch and transformers takes longer than many a small phase takes to train. No phase runs in this process, so a
phase that is forked from it finds imported modules and nothing of another phase's. It never asks for a GPU: CUDA does
not survive a fork.

An order is a datagram of JSON on the socket: ``arguments`` of ``python -m trainers``, ``environment``, and the ``log`` to
print to. Answers are ``{"ready": true}`` once, ``{"pid": N}`` to each order, and ``{"pid": N, "status": S}`` when it has ended
(negative: by that signal). At the socket's end this process goes, and its phases are asked to stop.
"""

import ctypes
import gc
import importlib
import json
import os
import select
import signal
import socket
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

from trainers.contract import JOB_VARIABLE

PR_SET_PDEATHSIG = 1
LARGEST_ORDER = 2**20
"""Bytes. An environment is some kilobytes."""
ROOM = 4096
"""Bytes that a phase's mark and arguments may take in what the system shows of a process."""


def main() -> int:
    orders = socket.socket(fileno=int(sys.argv[1]))
    _import_phases()
    gc.freeze()  # a collection in a phase would write to, and so copy, every page of the modules
    ended, wake = os.pipe()
    os.set_blocking(wake, False)
    signal.set_wakeup_fd(wake)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    orders.send(b'{"ready": true}')
    while True:
        readable, _, _ = select.select([orders.fileno(), ended], [], [])
        if ended in readable:
            os.read(ended, 4096)
            _report(orders)
        if orders.fileno() in readable:
            order = orders.recv(LARGEST_ORDER)
            if not order:
                return 0
            _fork(orders, json.loads(order))


def _import_phases() -> None:
    from trainers.phases import REGISTRY

    for kind in REGISTRY:
        importlib.import_module(kind.module)
    importlib.import_module("trainers.launch")
    importlib.import_module("transformers.generation.utils")
    importlib.import_module("transformers.modeling_layers")


def _report(orders: socket.socket) -> None:
    """Say of every phase that has ended how it did."""
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if pid == 0:
            return
        orders.send(json.dumps({"pid": pid, "status": os.waitstatus_to_exitcode(status)}).encode())


def _fork(orders: socket.socket, order: Mapping[str, Any]) -> None:
    here = os.getpid()
    pid = os.fork()
    if pid:
        orders.send(json.dumps({"pid": pid}).encode())
        return
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    orders.close()
    _become_phase(here, **order)


def _become_phase(starter: int, arguments: list[str], environment: dict[str, str], log: str) -> NoReturn:
    """What the kernel does for a process that is started, as far as a fork lacks it."""
    from trainers.__main__ import main as phase_main
    from trainers.ending import exit_with

    os.setsid()
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != starter:  # it died before the wish was made
        os._exit(128 + signal.SIGTERM)
    output = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.close(output)
    os.environ.clear()
    os.environ.update(environment)
    _show(arguments, environment)
    _reseed()
    sys.argv = ["trainers", *arguments]
    exit_with(phase_main)


def _reseed() -> None:
    """numpy's global generator is seeded at import; Python's own sees to itself."""
    import numpy as np
    import torch

    np.random.seed()
    if (threads := int(os.environ["OMP_NUM_THREADS"])) != torch.get_num_threads():
        torch.set_num_threads(threads)


def _show(arguments: list[str], environment: Mapping[str, str]) -> None:
    """Let ``ps`` and whoever looks for a phase's processes by their mark find this one: the system shows what it was
    started with, which is memory of its own. It was started with room for that (:func:`room`)."""
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    arg_start, arg_end, env_start, env_end = (int(field) for field in fields[45:49])
    _overwrite(arg_start, arg_end, _padding(), " ".join(arguments))
    _overwrite(env_start, env_end, f"{JOB_VARIABLE}={_padding()}", f"{JOB_VARIABLE}={environment[JOB_VARIABLE]}")


def room() -> tuple[list[str], dict[str, str]]:
    """Arguments and environment that leave room for a phase's own."""
    return [_padding()], {JOB_VARIABLE: _padding()}


def _padding() -> str:
    return " " * ROOM


def _overwrite(start: int, end: int, what: str, by: str) -> None:
    at = ctypes.string_at(start, end - start).find(what.encode())
    text = by.encode()[: len(what)]
    if at >= 0:
        ctypes.memmove(start + at, text.ljust(len(what), b"\0"), len(what))


if __name__ == "__main__":
    sys.exit(main())

"""Servers end with whoever holds the line to them, however that ends, and leave nothing."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from trainers import keeper

PARENT = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
print(child.pid, flush=True)
time.sleep(600)
"""
"""A server whose child has left its group."""

DEAF = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('deaf', flush=True); time.sleep(600)"

HOLDER = """
import json, socket, sys, time
line = socket.socket(fileno=int(sys.argv[1]))
line.sendall(sys.argv[2].encode() + b"\\n")
time.sleep(600)
"""


def order(program: str, log: Path) -> bytes:
    return json.dumps(
        {
            "command": [sys.executable, "-c", program],
            "environment": {"MARK": "set"},
            "log": str(log),
            "scratch": [str(log.with_suffix(".scratch"))],
        }
    ).encode()


@pytest.fixture
def line():
    """Our end of the line to a keeper."""
    ours, its = socket.socketpair()
    with its:
        process = subprocess.Popen([sys.executable, "-I", "-S", keeper.__file__], stdin=its.fileno())
    with ours:
        yield ours
    assert process.wait(60) == 0


def lines_of(log: Path, wanted: int) -> list[str]:
    while not log.exists() or log.read_text().count("\n") < wanted:
        time.sleep(0.05)
    return log.read_text().splitlines()


def is_there(pid: int) -> bool:
    with suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    return False


def let_go(line: socket.socket) -> None:
    line.shutdown(socket.SHUT_WR)
    line.settimeout(60)
    assert line.recv(100) == b"", "closed once the server is gone"


def test_a_server_ends_with_all_that_it_has_started(line, tmp_path):
    line.sendall(order(PARENT, tmp_path / "log") + b"\n")
    child = int(lines_of(tmp_path / "log", 1)[0])
    assert is_there(child)
    let_go(line)
    assert not is_there(child)


def test_one_that_ends_by_itself_is_told_of(line, tmp_path):
    line.sendall(order("import os, sys; print(os.environ['MARK']); sys.exit(3)", tmp_path / "log") + b"\n")
    assert json.loads(line.recv(100)) == {"status": 3}
    assert lines_of(tmp_path / "log", 1) == ["set"]


def test_a_program_that_is_not_there(line, tmp_path):
    wanted = {"command": ["/no/vllm", "serve"], "environment": {}, "log": str(tmp_path / "log"), "scratch": []}
    line.sendall(json.dumps(wanted).encode() + b"\n")
    assert json.loads(line.recv(200)) == {"error": "/no/vllm: No such file or directory"}


def test_nobody_has_ordered_anything(line):
    let_go(line)


def test_a_server_that_does_not_listen_is_killed(tmp_path):
    program = "from trainers import keeper; keeper.GRACE_SECONDS = 0.2; keeper.main()"
    ours, its = socket.socketpair()
    with its:
        process = subprocess.Popen([sys.executable, "-c", program], stdin=its.fileno())
    with ours:
        ours.sendall(order(DEAF, tmp_path / "log") + b"\n")
        lines_of(tmp_path / "log", 1)
        let_go(ours)
    assert process.wait(60) == 0


def test_a_holder_that_is_killed(tmp_path):
    """As a phase that meets `kill -9`: it says nothing, and its server ends nevertheless."""
    ours, its = socket.socketpair()
    with its:
        kept = subprocess.Popen([sys.executable, "-I", "-S", keeper.__file__], stdin=its.fileno())
    with ours:
        words = [sys.executable, "-c", HOLDER, str(ours.fileno()), order(PARENT, tmp_path / "log").decode()]
        holder = subprocess.Popen(words, pass_fds=[ours.fileno()])
    child = int(lines_of(tmp_path / "log", 1)[0])
    (tmp_path / "log.scratch").mkdir()
    holder.kill()
    holder.wait()
    assert kept.wait(60) == 0
    assert not is_there(child)
    assert not (tmp_path / "log.scratch").exists(), "weights that only the server has read"


def test_a_keeper_in_a_container_of_its_own_keeps_one_after_the_other(tmp_path):
    door = str(tmp_path / "door")
    process = subprocess.Popen([sys.executable, "-I", "-S", keeper.__file__, door])
    while not os.path.exists(door):
        time.sleep(0.05)
    for log in (tmp_path / "first", tmp_path / "second"):
        with socket.socket(socket.AF_UNIX) as line:
            while line.connect_ex(door):
                time.sleep(0.05)
            line.sendall(order(PARENT, log) + b"\n")
            child = int(lines_of(log, 1)[0])
            let_go(line)
            assert not is_there(child)
    with socket.socket(socket.AF_UNIX) as line:
        line.connect(door)
        line.sendall(order(PARENT, tmp_path / "third") + b"\n")
        child = int(lines_of(tmp_path / "third", 1)[0])
        process.send_signal(signal.SIGTERM)  # the pod ends
        assert process.wait(60) == 0
    assert not is_there(child)

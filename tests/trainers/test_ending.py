"""How a process ends whose libraries' threads are still at work."""

import os
import socket
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

LATE = textwrap.dedent("""
    import os, sys, time
    import torch
    import torch.distributed as dist
    from trainers.ending import exit_with

    def main():
        dist.init_process_group("gloo")
        if dist.get_rank() == 0:
            time.sleep(1)  # the other one is done before
            dist.all_reduce(torch.ones(1), async_op=True)
            time.sleep(1)
            return 0
        work = dist.all_reduce(torch.ones(1), async_op=True)
        kept.append(work.get_future().then(lambda future: future.value()))  # gloo's thread calls Python

    kept = []
    {end}
""")


def _ends(end: str) -> list[tuple[int, str]]:
    """Exit statuses and last words of two processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    meeting = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", LATE.replace("{end}", end)]
    started = [
        subprocess.Popen(command, env=os.environ | meeting | {"RANK": rank}, stderr=subprocess.PIPE, text=True)
        for rank in ("0", "1")
    ]
    said = [process.communicate(timeout=900)[1] for process in started]
    return [(process.returncode, text) for process, text in zip(started, said, strict=True)]


@pytest.mark.slow
def test_a_thread_that_wants_the_interpreter_late_is_no_crash():
    assert [status for status, _ in _ends("exit_with(main)")] == [0, 0]


@pytest.mark.slow
@pytest.mark.skipif(sys.version_info >= (3, 14), reason="threads wait there instead")
def test_without_that_it_is_one():
    (_, (status, said)) = _ends("sys.exit(main())")
    assert status < 0 and "terminate called without an active exception" in said


@pytest.mark.parametrize(
    ("code", "status", "said"),
    [
        ("lambda: 3", 3, "over"),
        ("lambda: None", 0, "over"),
        ("lambda: sys.exit(2)", 2, "over"),
        ("lambda: sys.exit('a reason')", 1, "a reason\nover"),
        ("lambda: 1 / 0", 1, "ZeroDivisionError: division by zero\nover"),
    ],
)
def test_statuses_are_what_they_were_and_what_waits_for_the_end_is_done(code, status, said):
    script = f"import atexit, sys; from trainers.ending import exit_with; exit_with({code})"
    script = script.replace("lambda: ", "lambda: atexit.register(print, 'over', file=sys.stderr) and ")
    done = subprocess.run([sys.executable, "-c", script], check=False, capture_output=True, text=True, timeout=900)
    assert done.returncode == status
    assert done.stderr.strip().endswith(said)


@pytest.mark.parametrize(("end", "status"), [("return 0", 0), ("return 75", 75), ("raise ValueError", 1)])
def test_a_thread_that_waits_for_ever_is_left(end, status):
    script = f"""
import threading
from trainers import ending
ending.LINGER_SECONDS = 0.5
def main():
    threading.Thread(target=threading.Event().wait).start()
    {end}
ending.exit_with(main)
"""
    assert subprocess.run([sys.executable, "-c", script], check=False, timeout=900).returncode == status


def test_a_phase_registers_nothing_before():
    """It would wait for ever."""
    script = "import atexit, trainers.__main__; print(atexit._ncallbacks())"
    done = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True, timeout=900)
    assert done.stdout == "0\n"


SCRIPTS = [
    path
    for folder in ("tests", "benchmarks")
    for path in sorted((ROOT / folder).rglob("*.py"))
    if '\nif __name__ == "__main__":\n' in path.read_text()
    and any(word in path.read_text() for word in ("Run by torchrun", "process_group", "device_mesh", "Workers"))
]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_every_script_of_several_processes_ends_so(script):
    """One that was forgotten has failed a whole run of the tests, once in many."""
    assert script.read_text().split('\nif __name__ == "__main__":\n')[1].startswith("    exit_with(")


def test_scripts_of_several_processes_are_found():
    assert {"dying", "checkpoint_share"} <= {s.stem for s in SCRIPTS}

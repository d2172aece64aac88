"""A server that the phase starts itself: from the model's files, over a socket of its own, and gone with the phase."""

import json
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from trainers import keeper
from trainers.contract import KEEPER_VARIABLE

PROGRAM = Path(__file__).with_name("served.py")
MEMORY_LOG = Path(__file__).with_name("vllm_memory.log")
PROMPTS = {"prompts": [{"synthetic": {"task": "letters", "split": "prompts", "count": 12}}], "maxPromptLength": 32}


def spec_for(folder, program=None, args=(), **server):
    base = {"policy": {"source": str(folder)}, "data": PROMPTS, "sampling": {"maxNewTokens": 8, "temperature": 0}}
    if program is None:
        return base
    command = [sys.executable, *program]
    base["sampling"]["engine"] = "vllm"
    return {**base, "server": {"command": command, "args": list(args), **server}}


def traces(output: Path):
    return [json.loads(line) for line in (output / "traces.jsonl").read_text().splitlines()]


def nothing_is_left(folder) -> bool:
    return not [p for p in psutil.process_iter(["cmdline"]) if str(folder) in (p.info["cmdline"] or [])]


def test_its_responses_are_the_own_engines(run_phase, louder, tmp_path):
    folder = louder(4)
    for name, spec in (("own", spec_for(folder)), ("vllm", spec_for(folder, [str(PROGRAM)]))):
        assert run_phase("rollout", spec, None, tmp_path / name / "rollout")[0] == 0
    assert traces(tmp_path / "own" / "rollout") == traces(tmp_path / "vllm" / "rollout")
    assert nothing_is_left(folder)


def test_one_in_another_container(run_phase, louder, tmp_path, monkeypatch):
    """On a cluster a keeper is there already, behind a socket that both containers see, and stays for the next phase's server."""
    door = tmp_path / "door"
    kept = subprocess.Popen([sys.executable, "-I", "-S", keeper.__file__, str(door)])
    monkeypatch.setenv(KEEPER_VARIABLE, str(door))
    try:
        spec = spec_for(louder(4), [str(PROGRAM)])
        assert run_phase("rollout", spec, None, tmp_path / "run" / "rollout")[0] == 0
        assert len(traces(tmp_path / "run" / "rollout")) == 12
        assert kept.poll() is None and not psutil.Process(kept.pid).children()
    finally:
        kept.terminate()
    assert kept.wait(60) == 0


def test_a_container_that_does_not_come(run_phase, louder, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv(KEEPER_VARIABLE, str(tmp_path / "nobody"))
    spec = spec_for(louder(4), [str(PROGRAM)], startTimeoutSeconds=1)
    assert run_phase("rollout", spec, None, tmp_path / "run" / "rollout")[0] == 75
    assert "the container of the server does not answer" in capsys.readouterr().err


def test_one_that_breaks_is_told_of_at_once(run_phase, louder, tmp_path, capsys):
    folder, output = louder(4), tmp_path / "run" / "rollout"
    broken = spec_for(folder, [str(PROGRAM)], ["--break-after", "8"])
    broken["sampling"]["batchSize"] = 4
    assert run_phase("rollout", broken, None, output)[0] == 75
    said = capsys.readouterr().err.splitlines()[-1]
    assert "policy: the phase's own vLLM is gone, it ended with status 3: ValueError: no memory for this" in said
    assert nothing_is_left(folder)


@pytest.mark.parametrize(
    ("program", "status", "reason"),
    [
        ("import sys; print('error: no flag --x', file=sys.stderr); sys.exit(2)", 2, "status 2: error: no flag --x"),
        ("print('RuntimeError: a GPU is lost'); print('bye'); exit(1)", 75, "status 1: RuntimeError: a GPU is lost"),
        (f"print(open({str(MEMORY_LOG)!r}).read()); exit(1)", 2, "memory utilization (0.92, 21.66 GiB)"),
        ("pass", 2, "status 0: it has said nothing; set server.command to what starts a vLLM"),
        ("import no_vllm", 2, "status 1: ModuleNotFoundError: No module named 'no_vllm'; set server.command to"),
        ("import os; os.kill(os.getpid(), 9)", 75, "it was killed by signal 9: it has said nothing"),
    ],
)
def test_one_that_does_not_come_to_answer(run_phase, louder, tmp_path, capsys, program, status, reason):
    spec = spec_for(louder(4), ["-c", program])
    assert run_phase("rollout", spec, None, tmp_path / "run" / "rollout")[0] == status
    said = capsys.readouterr().err.splitlines()[-1]
    assert "policy: the phase's own vLLM is gone before it answered" in said and reason in said
    assert (str(MEMORY_LOG) in program) is ("set --gpu-memory-utilization in server.args" in said)


def test_one_that_takes_less(run_phase, louder, tmp_path, capsys):
    """Where the spec does not say how long prompts are."""
    spec = {**spec_for(louder(4), [str(PROGRAM)], ["--max-model-len", "16"]), "data": {"prompts": PROMPTS["prompts"]}}
    assert run_phase("rollout", spec, None, tmp_path / "run" / "rollout")[0] == 2
    said = capsys.readouterr().err
    assert "the phase's own vLLM takes 16 tokens" in said and "in server.args, or lower maxNewTokens" in said


def test_its_temporary_files_go_with_it(run_phase, louder, tmp_path, capsys):
    leaves = "import os, sys, tempfile; open(os.path.join(tempfile.gettempdir(), 'vllm_dist_1'), 'w').close(); "
    leaves += "exit(f'error: {tempfile.gettempdir()} {os.path.dirname(sys.argv[3])}')"
    assert run_phase("rollout", spec_for(louder(4), ["-c", leaves]), None, tmp_path / "run" / "rollout")[0] == 75
    used, of_the_phase = capsys.readouterr().err.splitlines()[-1].split("error: ")[1].split()
    assert used == of_the_phase and not Path(used).exists()


def test_a_folder_whose_sockets_would_have_too_long_a_name(run_phase, louder, tmp_path, capsys, monkeypatch):
    folder = tmp_path / ("x" * 80)
    folder.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    assert run_phase("rollout", spec_for(louder(4), [str(PROGRAM)]), None, tmp_path / "run" / "rollout")[0] == 2
    assert (
        f"{folder}, whose name has" in (said := capsys.readouterr().err) and "set TMPDIR to one of 56 at most" in said
    )


def test_one_that_takes_too_long(run_phase, louder, tmp_path, capsys):
    slow = spec_for(louder(4), ["-c", "import time; time.sleep(600)", "slow"], startTimeoutSeconds=1)
    assert run_phase("rollout", slow, None, tmp_path / "run" / "rollout")[0] == 75
    assert "has not answered within 1 s (server.startTimeoutSeconds)" in capsys.readouterr().err


def test_one_that_takes_connections_and_says_nothing(run_phase, louder, tmp_path, capsys):
    args = ["--hang", "/v1/models", str(tmp_path / "hangs")]
    silent = spec_for(louder(4), [str(PROGRAM)], args, startTimeoutSeconds=30)
    begun = time.monotonic()
    assert run_phase("rollout", silent, None, tmp_path / "run" / "rollout")[0] == 75
    assert "has not answered within 30 s (server.startTimeoutSeconds)" in capsys.readouterr().err
    assert time.monotonic() - begun < 300, "and not for as long as any answer may take"


def test_a_program_that_is_not_there(run_phase, louder, tmp_path, capsys):
    spec = spec_for(louder(4), [])
    spec["server"]["command"] = ["/opt/no-vllm", "serve"]
    assert run_phase("rollout", spec, None, tmp_path / "run" / "rollout")[0] == 2
    assert "it could not be started (/opt/no-vllm: No such file or directory)" in capsys.readouterr().err

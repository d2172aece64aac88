"""A server that follows weights in training: what it samples is of the weights as they are, and corrected for what it is not."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import yaml
from distributed.acting import after_steps
from finished import assert_same, weights
from test_own_server import nothing_is_left

from trainers.contract import BadInput
from trainers.core.served.line import Line
from trainers.meter import Meter

PROGRAM = Path(__file__).with_name("served.py")
SERVER = {"command": [sys.executable, str(PROGRAM)]}
PROMPTS = {"prompts": [{"synthetic": {"task": "letters", "split": "prompts", "count": 16}}], "maxPromptLength": 32}


def lines(output: Path):
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def test_a_students_greedy_samples_are_the_own_engines_at_every_step(run_phase, louder, tmp_path):
    """Large steps: with the weights of one step before, samples and losses would be others."""
    for name, served in (("own", {}), ("vllm", {"engine": "vllm"})):
        spec = {
            "teacher": {"source": str(louder(4))},
            "student": {"source": str(louder(2))},
            "prompts": PROMPTS,
            "onPolicyFraction": 1,
            "sampling": {"maxNewTokens": 8, "temperature": 0, **served},
            "maxLength": 64,
            "batchSize": 4,
            "duration": {"maxSteps": 4},
            "optim": {"lr": 0.02},
            **({"server": SERVER} if served else {}),
        }
        assert run_phase("distill", spec, None, tmp_path / name / "distill")[0] == 0
    own, theirs = (lines(tmp_path / name / "distill") for name in ("own", "vllm"))
    assert [line["loss"] for line in theirs] == pytest.approx([line["loss"] for line in own], rel=1e-4)
    assert max(line["mismatch"] for line in theirs) < 1e-6
    assert "mismatch" not in own[0]


def test_ppo_measures_how_far_the_sampler_is_from_the_policy(run_phase, louder, tiny_reward_dir, tmp_path):
    spec = {
        "policy": {"source": str(louder(4))},
        "rewardModel": {"source": str(tiny_reward_dir)},
        "data": PROMPTS,
        "iterations": 3,
        "batchSize": 8,
        "ppoEpochs": 2,
        "sampling": {"maxNewTokens": 8, "temperature": 0.7, "engine": "vllm"},
        "optim": {"lr": 0.02},
        "server": SERVER,
    }
    assert run_phase("ppo", spec, None, tmp_path / "run" / "ppo")[0] == 0
    found = lines(tmp_path / "run" / "ppo")
    assert max(line["mismatch"] for line in found) < 1e-6, "of the temperature that was sampled at"
    assert [line["importance_weight"] for line in found] == pytest.approx([1, 1, 1], abs=1e-3)
    assert max(line["approx_kl"] for line in found) > 1e-3, "which older weights would show as a mismatch"


def student_spec(louder, **changes):
    """Of greedy samples, which are the same of any engine: with large steps those of other weights are others."""
    return {
        "teacher": {"source": str(louder(4))},
        "student": {"source": str(louder(2))},
        "prompts": PROMPTS,
        "onPolicyFraction": 1,
        "sampling": {"maxNewTokens": 8, "temperature": 0, "engine": "vllm"},
        "server": SERVER,
        "importanceCap": None,
        "maxLength": 64,
        "batchSize": 4,
        "duration": {"maxSteps": 6},
        "optim": {"lr": 0.02, "eps": 1e-5},
    } | changes


def own_engine(spec):
    """The same without a server."""
    return {key: value for key, value in spec.items() if key != "server"} | {
        "sampling": spec["sampling"] | {"engine": "own"}
    }


def test_a_server_that_will_take_less_is_not_started(run_phase, louder, tmp_path, capsys):
    """What the spec cannot tell, because it does not say how long prompts are."""
    prompts = {"prompts": PROMPTS["prompts"]}
    server = {"command": ["/opt/no-vllm"], "args": ["--max-model-len", "16"]}
    spec = student_spec(louder, prompts=prompts, server=server)
    assert run_phase("distill", spec, None, tmp_path / "run" / "distill")[0] == 2
    said = capsys.readouterr().err
    assert "and sampling.maxNewTokens 8 are more than --max-model-len 16 of server.args: set " in said


@pytest.fixture
def half(tmp_path):
    """Every second step learns from traces, and samples nothing."""
    rows = [{"prompt": "sort : B A", "teacher_response": "A B", "reward": 1.0}] * 8
    (tmp_path / "traces.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {"onPolicyFraction": 0.5, "traces": {"files": str(tmp_path / "traces.jsonl")}}


@pytest.mark.parametrize("staleness", [1, 3])
def test_samples_ahead_are_of_the_weights_that_copies_would_have(run_phase, louder, half, tmp_path, staleness):
    spec = student_spec(louder, staleness=staleness, **({"lora": {"rank": 4}} if staleness == 1 else half))
    for name, asked in (("copies", own_engine(spec)), ("vllm", spec)):
        assert run_phase("distill", asked, None, tmp_path / name / "distill")[0] == 0
    copies, theirs = (lines(tmp_path / name / "distill") for name in ("copies", "vllm"))
    own = [(mine, line) for mine, line in zip(copies, theirs, strict=True) if line["on_policy"]]
    assert [line["staleness"] for _, line in own] == [min(line["step"] - 1, staleness) for _, line in own]
    assert [line["loss"] for line in theirs] == pytest.approx([line["loss"] for line in copies], rel=1e-4)
    assert [line["mismatch"] for _, line in own] == pytest.approx([mine["mismatch"] for mine, _ in own], abs=1e-5)
    assert own[-1][1]["mismatch"] > 1e-4, "of weights that have changed since"
    assert nothing_is_left(PROGRAM)


def test_one_that_was_started_before_steps_that_sample_nothing_gets_the_weights_of_now(
    run_phase, louder, half, tmp_path
):
    """The first step learns from traces, and its update is large."""
    spec = student_spec(louder, **half)
    for name, asked in (("own", own_engine(spec)), ("vllm", spec)):
        assert run_phase("distill", asked, None, tmp_path / name / "distill")[0] == 0
    own, theirs = (lines(tmp_path / name / "distill") for name in ("own", "vllm"))
    assert not own[0]["on_policy"] and own[1]["on_policy"]
    assert [line["loss"] for line in theirs] == pytest.approx([line["loss"] for line in own], rel=1e-4)
    assert max(line["mismatch"] for line in theirs if line["on_policy"]) < 1e-5


@pytest.fixture
def beginnings(monkeypatch):
    """Of servers: whether the steps had begun then, and the parts of a step that were being measured."""
    begun, measured, found = [], [], []

    @contextmanager
    def part(meter, name):
        measured.append(name)
        with real_part(meter, name):
            yield
        measured.remove(name)

    def begin(meter, *args):
        begun.append(args)
        real_begin(meter, *args)

    def close(meter):
        begun.clear()
        real_close(meter)

    class Noted(Line):
        def __init__(self, *args) -> None:
            found.append((bool(begun), [*measured]))
            super().__init__(*args)

    real_part, real_begin, real_close = Meter.part, Meter.begin, Meter.close
    monkeypatch.setattr(Meter, "part", part)
    monkeypatch.setattr(Meter, "begin", begin)
    monkeypatch.setattr(Meter, "close", close)
    monkeypatch.setattr("trainers.core.served.started.Line", Noted)
    return found


def test_a_servers_start_is_no_steps_time(run_phase, louder, half, tiny_reward_dir, beginnings, tmp_path):
    """Of which `seconds_rollout` would be minutes, and the time that is left as many times that as there are steps."""
    ppo = {"policy": {"source": str(louder(4))}, "rewardModel": {"source": str(tiny_reward_dir)}, "data": PROMPTS}
    ppo |= {"iterations": 1, "batchSize": 4, "sampling": {"maxNewTokens": 4, "engine": "vllm"}, "server": SERVER}
    evaluation = {"models": [{"name": "a", "source": str(louder(4))}], "latency": {"enabled": False}}
    evaluation |= {"data": {"rows": PROMPTS["prompts"]}, "benchmarks": [{"name": "length", "length": {}}]}
    evaluation |= {"sampling": ppo["sampling"], "server": SERVER}
    distill = student_spec(louder, **half, duration={"maxSteps": 2})
    for kind, spec in (("ppo", ppo), ("distill", distill), ("evaluate", evaluation)):
        assert run_phase(kind, spec, None, tmp_path / kind / kind)[0] == 0
    assert beginnings[:2] == [(False, []), (False, [])]
    assert [measured for _, measured in beginnings] == [[], [], []]
    no_samples = distill | {"onPolicyFraction": 0.2, "duration": {"maxSteps": 2}}
    assert run_phase("distill", no_samples, None, tmp_path / "none" / "distill")[0] == 0
    assert len(beginnings) == 3, "nobody is started for steps that sample nothing"


def until(happened) -> None:
    last = time.monotonic() + 900
    while not happened():
        assert time.monotonic() < last
        time.sleep(0.02)


@pytest.fixture
def scratch():
    """For temporary files. Pytest's folders have names that are too long for a server's sockets."""
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        yield Path(folder)


def test_one_that_is_killed_leaves_nothing_and_goes_on_to_the_same_weights(run_phase, louder, tmp_path, scratch):
    """With responses of two steps on their way, and a server that is started anew with other weights than the first one."""
    spec = student_spec(louder, staleness=2, checkpoint={"everySteps": 1}, duration={"maxSteps": 8})
    whole, output = tmp_path / "whole" / "run" / "distill", tmp_path / "killed" / "run" / "distill"
    assert run_phase("distill", own_engine(spec), None, whole)[0] == 0
    file = tmp_path / "phase.yaml"
    file.write_text(yaml.safe_dump({"output": str(output), "spec": spec}))
    phase = subprocess.Popen(
        [sys.executable, "-m", "trainers", "distill", "--spec", str(file)],
        env=os.environ | {"ALIGNMENT_METRICS_PORT": "0", "TMPDIR": str(scratch)},
    )
    until(lambda: (output / "checkpoints" / "step-3").is_dir() or phase.poll() is not None)
    assert phase.poll() is None
    phase.kill()
    phase.wait()
    until(lambda: nothing_is_left(PROGRAM) and not [*scratch.glob("weights-*"), *scratch.glob("vllm-*")])
    assert not (output / "result.json").exists()
    assert run_phase("distill", spec, None, output)[0] == 0
    assert_same(weights(output), weights(whole), tolerance=1e-6)


def test_a_server_that_breaks_beside_a_step_is_infrastructure(
    run_phase, louder, tmp_path, scratch, capsys, monkeypatch
):
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    spec = student_spec(louder, staleness=1, server=SERVER | {"args": ["--break-after", "14"]})
    assert run_phase("distill", spec, None, tmp_path / "broken" / "run" / "distill")[0] == 75
    said = capsys.readouterr().err.splitlines()[-1]
    assert "the phase's own vLLM is gone, it ended with status 3: ValueError: no memory for this" in said
    assert nothing_is_left(PROGRAM)
    assert not [*scratch.glob("weights-*"), *scratch.glob("vllm-*")]


@pytest.fixture
def hanging(louder, tmp_path, monkeypatch):
    """(a server that takes no weights, the file that says when it hangs). A stop leaves it a second."""
    monkeypatch.setattr("trainers.core.served.following.TRAINING_SECONDS", 1.0)
    file = tmp_path / "hangs"
    return student_spec(louder, staleness=1, server=SERVER | {"args": ["--hang", "/collective_rpc", str(file)]}), file


def test_a_stop_is_heard_while_a_server_takes_weights(run_phase, hanging, tmp_path):
    """Beside a step as in one: a call of its own ends after ten minutes, when a pod is long gone."""
    spec, file = hanging
    stopper = threading.Thread(target=lambda: (until(file.exists), os.kill(os.getpid(), signal.SIGTERM)))
    stopper.start()
    begun = time.monotonic()
    code, _ = run_phase("distill", spec, None, tmp_path / "run" / "distill")
    assert code == 143 and time.monotonic() - begun < 300
    stopper.join()
    assert nothing_is_left(PROGRAM)


def test_a_phase_that_ends_does_not_wait_for_what_it_has_asked_ahead(run_phase, hanging, tmp_path, capsys):
    spec, file = hanging

    def fail(step: int, *_) -> None:
        if step == 2:  # before which weights have changed
            until(file.exists)
            raise BadInput("no such thing")

    begun = time.monotonic()
    with after_steps(fail):
        code, _ = run_phase("distill", spec, None, tmp_path / "run" / "distill")
    assert code == 2 and time.monotonic() - begun < 300
    assert "no such thing" in capsys.readouterr().err
    assert nothing_is_left(PROGRAM)


@pytest.mark.slow
def test_two_processes_that_split_the_weights(run_phase, on_two_processes, louder, tmp_path):
    """One of them asks for both. Copies of split weights are refused, files are whole."""
    spec = student_spec(louder, staleness=2)
    one, two = tmp_path / "one" / "run" / "distill", tmp_path / "two" / "run" / "distill"
    assert run_phase("distill", own_engine(spec), None, one)[0] == 0
    file = tmp_path / "phase.yaml"
    file.write_text(yaml.safe_dump({"output": str(two), "spec": spec | {"parallel": {"strategy": "fsdp"}}}))
    on_two_processes("distill", file)
    assert_same(weights(two), weights(one), tolerance=1e-5)
    assert nothing_is_left(PROGRAM)

"""Workspaces on an object store, against a real S3 server (versitygw), whose objects are plain files."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from cluster import build, requirements
from cluster.processes import free_ports

from trainers.contract import PhaseDir, Result

KEY, SECRET = "test-key", "a-secret-nobody-should-see"
ROWS = '{"prompt": "copy box : A B", "response": "A B"}\n{"prompt": "copy box : B A", "response": "B A"}\n' * 8
EVERY_STEP = {"everySteps": 1, "keepLast": 3}


@dataclass
class Bucket:
    """An empty bucket; ``path`` is where the server keeps its objects."""

    uri: str
    path: Path

    def names(self, folder: str = "") -> set[str]:
        root = self.path / folder
        return {p.relative_to(root).as_posix() for p in root.rglob("*") if p.is_file()}


@dataclass
class Server:
    port: int
    root: Path
    process: subprocess.Popen

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait()


def serve(root: Path, port: int) -> Server:
    binary = build.ensure("s3").binary("versitygw")
    environment = {**os.environ, "ROOT_ACCESS_KEY": KEY, "ROOT_SECRET_KEY": SECRET}
    command = [str(binary), "--port", f"127.0.0.1:{port}", "posix", str(root)]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    server = Server(port, root, process)
    deadline = time.monotonic() + 30
    while True:
        try:
            urllib.request.urlopen(server.endpoint, timeout=5)
        except urllib.error.HTTPError:
            return server
        except OSError:
            assert process.poll() is None and time.monotonic() < deadline, "the S3 server does not start"
            time.sleep(0.05)


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    if reason := requirements.missing("s3"):
        if os.environ.get("CI") == "true":
            pytest.fail(f"S3 server: {reason}", pytrace=False)
        pytest.skip(f"S3 server: {reason}")
    server = serve(tmp_path_factory.mktemp("s3"), free_ports(1)[0])
    yield server
    server.stop()


@pytest.fixture
def bucket(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bucket]:
    use(monkeypatch, server.endpoint)
    name = re.sub(r"[^a-z0-9]", "-", tmp_path.name.lower()).strip("-")
    (server.root / name).mkdir()
    yield Bucket(f"s3://{name}", server.root / name)
    forget_connections()


def use(monkeypatch: pytest.MonkeyPatch, endpoint: str, secret: str = SECRET) -> None:
    """What a pod gets from its secret references."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", KEY)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", secret)
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    monkeypatch.setenv("AWS_REGION", "us-east-1")
    forget_connections()


def forget_connections() -> None:
    """fsspec keeps file systems, with the credentials they were made with, for the life of the process."""
    from s3fs import S3FileSystem

    S3FileSystem.clear_instance_cache()


@pytest.fixture
def in_pod(run_phase, tmp_path, bucket):
    """``in_pod(type, spec, phase=, run=, inputs=) -> (exit code, Result or None, its folder)``: in an empty folder each time."""
    count = iter(range(1000))

    def run(kind, spec, phase=None, run="run", inputs=(), remote=None, folder=None, **file):
        workspace = folder or tmp_path / f"pod-{next(count)}"
        found = {}
        for name in inputs:  # what the controller knows of them is in the phase file
            found[name] = workspace / run / name
            found[name].mkdir(parents=True, exist_ok=True)
            shutil.copy(bucket.path / "ws" / run / name / "result.json", found[name])
        output = workspace / run / (phase or kind)
        remote = remote or f"{bucket.uri}/ws"
        code, result = run_phase(kind, spec, found, output, remote=remote, baseDir=str(workspace), **file)
        return code, result, output

    return run


def sft(start: Path | str, **changes) -> dict:
    base = {
        "model": {"source": str(start)},
        "data": {
            "train": [{"synthetic": {"task": "letters", "split": "demonstrations", "count": 48}}],
            "maxLength": 64,
        },
        "batchSize": 16,
        "duration": {"maxSteps": 6},
        "optim": {"lr": 1e-3},
        "checkpoint": EVERY_STEP,
    }
    return {**base, **changes}


@pytest.fixture(scope="module")
def local(run_phase, tiny_model_dir, tmp_path_factory) -> tuple[Path, Result]:
    """The same phase, undisturbed, in a shared folder."""
    output = tmp_path_factory.mktemp("local") / "run" / "sft"
    code, result = run_phase("sft", sft(tiny_model_dir), None, output)
    assert code == 0
    return output, result


def weights(phase: Path) -> bytes:
    return (phase / "model" / "model.safetensors").read_bytes()


def steps(phase: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (phase / "metrics.jsonl").read_text().splitlines()]


# ---------------------------------------------------------------- a phase from end to end


def test_a_phase_leaves_in_the_store_what_it_leaves_in_a_folder(in_pod, bucket, tiny_model_dir, local):
    code, result, output = in_pod("sft", sft(tiny_model_dir))
    assert code == 0
    stored = bucket.path / "ws" / "run" / "sft"
    assert result.artifact_digest == local[1].artifact_digest
    assert weights(stored) == weights(output) == weights(local[0])
    assert PhaseDir(stored).read_result() == result
    assert steps(stored) == [1, 2, 3, 4, 5, 6]
    here = {p.relative_to(local[0]).as_posix() for p in local[0].rglob("*") if p.is_file()} - {"progress.json"}
    manifests = {f"checkpoints/step-{n}/.manifest.json" for n in (4, 5, 6)}
    assert bucket.names("ws/run/sft") == here | manifests


def test_a_stopped_phase_goes_on_in_another_pod(in_pod, stop_after, bucket, tiny_model_dir, local):
    with stop_after(3):
        code, result, stopped = in_pod("sft", sft(tiny_model_dir))
    assert (code, result) == (143, None)
    code, result, output = in_pod("sft", sft(tiny_model_dir))
    assert code == 0
    assert weights(output) == weights(local[0])
    assert result.artifact_digest == local[1].artifact_digest
    assert steps(bucket.path / "ws/run/sft") == [1, 2, 3, 4, 5, 6]
    assert result.seconds > json.loads((stopped / "checkpoints/step-3/state.json").read_text())["seconds"]
    assert not (stopped / "checkpoints/step-4").exists() and not (output / "checkpoints/step-2").exists()


@pytest.mark.parametrize(("keep", "left"), [(0, set()), (1, {"step-6"}), (3, {"step-4", "step-5", "step-6"})])
def test_as_many_checkpoints_stay_as_asked_for(in_pod, bucket, stop_after, tiny_model_dir, keep, left):
    spec = sft(tiny_model_dir, checkpoint={"everySteps": 1, "keepLast": keep})
    with stop_after(5):
        in_pod("sft", spec)
    in_pod("sft", spec)
    assert {name.split("/")[0] for name in bucket.names("ws/run/sft/checkpoints")} == left


def test_a_phase_that_is_killed_outright_goes_on_in_another_pod(bucket, tiny_model_dir, tmp_path):
    spec = sft(tiny_model_dir, duration={"maxSteps": 60}, checkpoint={"everySteps": 5})
    process = start(tmp_path / "a", spec, f"{bucket.uri}/ws")
    wait_for(lambda: any(bucket.path.glob("ws/run/sft/checkpoints/step-1[05]/.manifest.json")), process)
    process.kill()
    process.wait()
    assert not (bucket.path / "ws/run/sft/result.json").exists()
    assert start(tmp_path / "b", spec, f"{bucket.uri}/ws").wait(120) == 0
    assert start(tmp_path / "c", spec, None).wait(120) == 0
    assert min(int(p.name[5:]) for p in (tmp_path / "b/ws/run/sft/checkpoints").glob("step-*")) > 5
    assert weights(tmp_path / "b/ws/run/sft") == weights(tmp_path / "c/ws/run/sft")


def start(folder: Path, spec: dict, remote: str | None, prelude: str = "", **file) -> subprocess.Popen:
    """``python -m trainers`` in a process of its own, with an empty workspace, after the Python code ``prelude``."""
    folder.mkdir()
    document = {"output": str(folder / "ws/run/sft"), "spec": spec, "baseDir": str(folder / "ws"), "remote": remote}
    (folder / "phase.yaml").write_text(yaml.safe_dump({**document, **file}))
    arguments = ["trainers", "sft", "--spec", str(folder / "phase.yaml")]
    code = f"{prelude}\nimport runpy, sys\nsys.argv = {arguments}\nrunpy.run_module('trainers', run_name='__main__')"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ALIGNMENT_METRICS_PORT": "0"}
    return subprocess.Popen(
        [sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


def wait_for(condition, process: subprocess.Popen, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.stdout.read().decode()
        assert time.monotonic() < deadline
        time.sleep(0.02)


# ---------------------------------------------------------------- torn uploads


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-10])


def flip(path: Path) -> None:
    """Same size, other content."""
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))


def other(path: Path) -> None:
    """Same size, other content, and a right checksum."""
    from fsspec import filesystem

    content = path.read_bytes()
    name = path.as_posix().split("/s30/")[1]
    filesystem("s3").pipe_file(name, content[:-1] + bytes([content[-1] ^ 1]))


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: (folder / ".manifest.json").unlink(),
        lambda folder: truncate(folder / ".manifest.json"),
        lambda folder: (folder / "state.json").unlink(),
        lambda folder: truncate(folder / "model.optimizer.pt"),
        lambda folder: flip(folder / "model.safetensors"),
        lambda folder: other(folder / "model.safetensors"),
    ],
    ids=["no-manifest", "torn-manifest", "file-missing", "file-truncated", "file-changed", "file-of-another-writer"],
)
def test_the_checkpoint_before_a_torn_one_is_used(in_pod, stop_after, bucket, tiny_model_dir, local, capsys, damage):
    with stop_after(4):
        in_pod("sft", sft(tiny_model_dir))
    damage(bucket.path / "ws/run/sft/checkpoints/step-4")
    code, _, output = in_pod("sft", sft(tiny_model_dir))
    assert code == 0
    assert f"{bucket.uri}/ws/run/sft/checkpoints/step-4 is torn" in capsys.readouterr().err
    assert {p.name for p in (output / "checkpoints").iterdir()} == {"step-4", "step-5", "step-6"}
    assert weights(output) == weights(local[0])


def killed_at(name: str, times: int) -> str:
    """Python code: this process dies without a word when it is about to upload such an object for the n-th time."""
    return f"""
import os, signal
from s3fs import S3FileSystem
put, pipe, left = S3FileSystem._put_file, S3FileSystem._pipe_file, [{times}]
def check(path):
    left[0] -= {name!r} in path
    if not left[0]:
        os.kill(os.getpid(), signal.SIGKILL)
async def _put_file(self, local, path, *args, **kwargs):
    check(path)
    return await put(self, local, path, *args, **kwargs)
async def _pipe_file(self, path, *args, **kwargs):
    check(path)
    return await pipe(self, path, *args, **kwargs)
S3FileSystem._put_file, S3FileSystem._pipe_file = _put_file, _pipe_file
"""


@pytest.mark.parametrize(
    ("name", "times"),
    [
        ("step-4/model.optimizer.pt", 1),
        ("step-4/.manifest.json", 1),
        ("model/tokenizer.json", 1),
        (".index/", 1),
        ("result.json", 1),
    ],
)
def test_a_kill_between_two_objects_costs_nothing(in_pod, bucket, tiny_model_dir, local, tmp_path, name, times):
    process = start(tmp_path / "killed", sft(tiny_model_dir), f"{bucket.uri}/ws", killed_at(name, times))
    out, _ = process.communicate(timeout=120)
    assert process.returncode == -signal.SIGKILL, out.decode()
    assert not (bucket.path / "ws/run/sft/result.json").exists()
    code, result, output = in_pod("sft", sft(tiny_model_dir))
    assert code == 0
    assert weights(bucket.path / "ws/run/sft") == weights(output) == weights(local[0])
    assert result.artifact_digest == local[1].artifact_digest
    assert not (bucket.path / "ws/run/.history").exists()


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: (folder / "model/model.safetensors").unlink(),
        lambda folder: truncate(folder / "model/model.safetensors"),
        lambda folder: truncate(folder / "result.json"),
    ],
    ids=["model-missing", "model-truncated", "result-torn"],
)
def test_a_damaged_result_is_made_again_and_kept(in_pod, bucket, tiny_model_dir, local, damage):
    _, first, _ = in_pod("sft", sft(tiny_model_dir))
    damage(bucket.path / "ws/run/sft")
    code, second, output = in_pod("sft", sft(tiny_model_dir))
    assert code == 0
    assert second.artifact_digest == first.artifact_digest and second.started_at >= first.finished_at
    assert weights(output) == weights(local[0])
    [kept] = (bucket.path / "ws/run/.history").iterdir()
    assert (kept / "checkpoints/step-6").is_dir()


# ---------------------------------------------------------------- what goes wrong


def test_a_wrong_secret_is_bad_input(in_pod, bucket, server, tiny_model_dir, monkeypatch, capfd):
    use(monkeypatch, server.endpoint, secret="another-secret")
    code, _, _ = in_pod("sft", sft(tiny_model_dir))
    err = capfd.readouterr().err
    assert code == 2
    [line] = [line for line in err.splitlines() if line.startswith("BadInput")]
    assert f"{bucket.uri}/ws" in line and "check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY" in line
    assert "another-secret" not in err


def test_an_unknown_key_is_bad_input(in_pod, bucket, tiny_model_dir, monkeypatch, capfd):
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "nobody")
    assert in_pod("sft", sft(tiny_model_dir))[0] == 2
    assert "check AWS_ACCESS_KEY_ID" in capfd.readouterr().err


def test_missing_credentials_are_bad_input(in_pod, bucket, tiny_model_dir, monkeypatch, capfd):
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", os.devnull)
    assert in_pod("sft", sft(tiny_model_dir))[0] == 2
    assert "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("remote", "said"),
    [
        ("s3://no-such-bucket/ws", "s3://no-such-bucket/ws/run/sft: The specified bucket does not exist. Create it"),
        ("gs://bucket/ws", "pip install gcsfs"),
        ("nfs://bucket/ws", "Protocol not known: nfs"),
        ("s3://b_/ws", "s3://b_/ws"),
    ],
)
def test_an_unusable_address_is_bad_input(in_pod, bucket, tiny_model_dir, capfd, remote, said):
    assert in_pod("sft", sft(tiny_model_dir), remote=remote)[0] == 2
    assert said in capfd.readouterr().err


def test_a_server_that_is_down_is_infrastructure(in_pod, bucket, tiny_model_dir, monkeypatch, capfd):
    use(monkeypatch, f"http://127.0.0.1:{free_ports(1)[0]}")
    assert in_pod("sft", sft(tiny_model_dir))[0] == 75
    err = capfd.readouterr().err
    assert f"Infrastructure: {bucket.uri}/ws" in err and "check AWS_ENDPOINT_URL" in err


def test_a_server_that_goes_down_is_noticed_and_nothing_is_lost(
    tiny_model_dir, local, run_phase, tmp_path, monkeypatch
):
    root = tmp_path / "s3"
    (root / "bucket").mkdir(parents=True)
    own = serve(root, free_ports(1)[0])
    use(monkeypatch, own.endpoint)
    spec = sft(tiny_model_dir, duration={"maxSteps": 400}, checkpoint={"everySteps": 5, "keepLast": 1})
    process = start(tmp_path / "a", spec, "s3://bucket/ws")
    folder = root / "bucket/ws/run/sft/checkpoints"
    wait_for(lambda: any(folder.glob("step-1?/.manifest.json")), process)
    own.stop()
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 75, out.decode()
    assert "Infrastructure: s3://bucket/ws" in out.decode()
    again = serve(root, own.port)
    whole = [path.parent.name for path in folder.glob("*/.manifest.json")]
    assert whole
    process = start(tmp_path / "b", spec, "s3://bucket/ws")
    found = max(int(name.removeprefix("step-")) for name in whole)
    wait_for(lambda: number(tmp_path / "b/ws/run/sft", "step") > found, process)
    process.terminate()
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 143, out.decode()
    assert min(steps(tmp_path / "b/ws/run/sft")) == 1, "its metrics came along"
    again.stop()


def number(phase: Path, key: str) -> int:
    progress = PhaseDir(phase).read_progress()
    return getattr(progress, key) if progress else 0


# ---------------------------------------------------------------- reuse


def trained(output: Path) -> bool:
    """Whether anything was computed in this pod's folder."""
    return (output / "progress.json").exists()


def test_a_finished_phase_ends_at_once_without_a_model(in_pod, tiny_model_dir):
    _, first, _ = in_pod("sft", sft(tiny_model_dir))
    code, _, output = in_pod("sft", sft(tiny_model_dir))
    assert code == 0 and not trained(output) and not (output / "model").exists()
    assert first is not None


def test_another_run_adopts_the_result(in_pod, bucket, tiny_model_dir, capsys):
    in_pod("sft", sft(tiny_model_dir))
    code, _, output = in_pod("sft", sft(tiny_model_dir), run="second", phase="start")
    assert code == 0 and not trained(output)
    assert f"{bucket.uri}/ws/run/sft holds this result already" in capsys.readouterr().out
    ours = bucket.names("ws/run/sft")
    assert bucket.names("ws/second/start") == {n for n in ours if not n.startswith("checkpoints/")}
    shutil.rmtree(bucket.path / "ws/run")
    assert in_pod("sft", sft(tiny_model_dir), run="third")[0] == 0, "an index entry may point to nothing"
    assert (
        PhaseDir(bucket.path / "ws/third/sft").read_result() == PhaseDir(bucket.path / "ws/second/start").read_result()
    )


def test_an_edit_displaces_a_result_and_its_undoing_brings_it_back(in_pod, stop_after, bucket, tiny_model_dir):
    _, first, _ = in_pod("sft", sft(tiny_model_dir))
    with stop_after(2):
        in_pod("sft", sft(tiny_model_dir, seed=1))
    history = bucket.path / "ws/run/.history"
    [kept] = history.iterdir()
    assert PhaseDir(kept).read_result() == first and (kept / "checkpoints/step-6").is_dir()
    code, _, output = in_pod("sft", sft(tiny_model_dir))
    assert code == 0 and not trained(output)
    assert PhaseDir(bucket.path / "ws/run/sft").read_result() == first
    assert len(list(history.glob("*/checkpoints/step-2/.manifest.json"))) == 1, "unfinished work is kept too"


def test_changed_data_makes_a_new_result(in_pod, bucket, tiny_model_dir):
    data = bucket.path / "ws/data"
    data.mkdir(parents=True)
    (data / "a.jsonl").write_text(ROWS)
    spec = sft(tiny_model_dir, data={"train": [{"files": "data/*.jsonl"}], "maxLength": 64}, duration={"maxSteps": 1})
    code, first, _ = in_pod("sft", spec)
    assert code == 0 and first.data[0].rows == 16
    assert not trained(in_pod("sft", spec)[2])
    (data / "a.jsonl").write_text(ROWS.replace("copy", "sort"))
    code, second, _ = in_pod("sft", spec)
    assert code == 0 and second.digest == first.digest and second.artifact_digest != first.artifact_digest
    (data / "a.jsonl").write_text(ROWS)
    code, _, output = in_pod("sft", spec)
    assert code == 0 and not trained(output)
    assert PhaseDir(bucket.path / "ws/run/sft").read_result() == first


# ---------------------------------------------------------------- data and models by address


def test_data_and_model_by_address_in_a_shared_folder(run_phase, bucket, tiny_model_dir, tmp_path):
    """The digest is of the spec as written, the data's fingerprint of the contents, and the result names the address."""
    shutil.copytree(tiny_model_dir, bucket.path / "models/tiny")
    (bucket.path / "data").mkdir()
    (bucket.path / "data/train-0.jsonl").write_text(ROWS)
    (bucket.path / "data/other.jsonl").write_text("not read")
    (tmp_path / "train-0.jsonl").write_text(ROWS)
    changes = {"duration": {"maxSteps": 2}}
    address = {"train": [{"files": f"{bucket.uri}/data/train-*.jsonl"}], "maxLength": 64}
    spec = sft(f"{bucket.uri}/models/tiny", data=address, **changes)
    code, result = run_phase("sft", spec, None, tmp_path / "a/run/sft")
    assert code == 0
    files = {"train": [{"files": str(tmp_path / "train-*.jsonl")}], "maxLength": 64}
    _, plain = run_phase("sft", sft(tiny_model_dir, data=files, **changes), None, tmp_path / "b/run/sft")
    assert weights(tmp_path / "a/run/sft") == weights(tmp_path / "b/run/sft")
    assert result.data[0].fingerprint == plain.data[0].fingerprint
    assert result.settings["model"]["source"] == f"{bucket.uri}/models/tiny"
    assert result.settings["data"]["train"][0]["files"] == f"{bucket.uri}/data/train-*.jsonl"
    elsewhere = tmp_path / "c/deeper/run/sft"
    assert run_phase("sft", spec, None, elsewhere)[1].digest == result.digest

    (bucket.path / "data/train-1.jsonl").write_text(ROWS)
    assert run_phase("sft", spec, None, tmp_path / "a/run/sft")[1].data[0].rows == 32
    (bucket.path / "data/train-1.jsonl").unlink()
    _, again = run_phase("sft", spec, None, tmp_path / "a/run/sft")
    assert again == result, "found in the history"


def test_data_and_model_in_a_remote_workspace(in_pod, bucket, tiny_model_dir):
    shutil.copytree(tiny_model_dir, bucket.path / "ws/models/tiny")
    (bucket.path / "ws/train.jsonl").write_text(ROWS)
    data = {"train": [{"files": "train.jsonl"}], "maxLength": 64}
    code, result, _ = in_pod("sft", sft("./models/tiny", data=data, duration={"maxSteps": 1}))
    assert code == 0 and result.data[0].rows == 16


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ({"data": {"train": [{"files": "data/none-*.jsonl"}]}}, "no object matches {uri}/ws/data/none-*.jsonl"),
        ({"data": {"train": [{"files": "{uri}/none.jsonl"}]}}, "no object matches {uri}/none.jsonl"),
        ({"model": {"source": "{uri}/models/none"}}, "model {uri}/models/none: there are no objects"),
        ({"model": {"source": "s3://key:secret@bucket/model"}}, "credentials come from the environment"),
        ({"model": {"source": "s3://bucket/../model"}}, "not an address of the form"),
    ],
)
def test_what_is_not_there_is_named(in_pod, bucket, tiny_model_dir, capfd, spec, said):
    spec = json.loads(json.dumps(spec).replace("{uri}", bucket.uri))
    assert in_pod("sft", sft(tiny_model_dir, **spec))[0] == 2
    err = capfd.readouterr().err
    assert said.replace("{uri}", bucket.uri) in err and "key:secret" not in err

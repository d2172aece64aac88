"""Workspaces on an object store: a phase from end to end, torn uploads, stores that cannot be used."""

import json
import os
import re
import signal
import time
from pathlib import Path

import pytest
import remote_store
from cluster.processes import free_ports
from remote_store import serve, sft, start, steps, use, wait_for, weights

from trainers.contract import Result
from trainers.phase_dir import PhaseDir
from trainers.remote.checkpoints import StoredCheckpoints
from trainers.remote.phase import RemotePhase
from trainers.remote.store import Store

# Fixtures.
server, bucket, in_pod = remote_store.server, remote_store.bucket, remote_store.in_pod


@pytest.fixture(scope="module")
def local(run_phase, tiny_model_dir, tmp_path_factory) -> tuple[Path, Result]:
    """The same phase, undisturbed, in a shared folder."""
    output = tmp_path_factory.mktemp("local") / "run" / "sft"
    code, result = run_phase("sft", sft(tiny_model_dir), None, output)
    assert code == 0
    return output, result


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
    assert result.seconds > json.loads((stopped / "checkpoints/step-3/state.json").read_text())["content"]["seconds"]
    assert not (stopped / "checkpoints/step-4").exists() and not (output / "checkpoints/step-2").exists()


@pytest.mark.parametrize(("keep", "left"), [(0, set()), (1, {"step-6"}), (3, {"step-4", "step-5", "step-6"})])
def test_as_many_checkpoints_stay_as_asked_for(in_pod, bucket, stop_after, tiny_model_dir, keep, left):
    spec = sft(tiny_model_dir, checkpoint={"everySteps": 1, "keepLast": keep})
    with stop_after(5):
        in_pod("sft", spec)
    in_pod("sft", spec)
    assert {name.split("/")[0] for name in bucket.names("ws/run/sft/checkpoints")} == left


@pytest.mark.parametrize("keep", [0, 1])
def test_a_slow_store_changes_nothing(in_pod, bucket, run_phase, tiny_model_dir, tmp_path, monkeypatch, keep):
    """Files are pruned and replaced here while they are being uploaded."""
    from trainers.remote.store import Store

    rows = {"synthetic": {"task": "letters", "split": "demonstrations", "count": 16}}
    spec = sft(
        tiny_model_dir,
        data={"train": [rows], "eval": [rows], "maxLength": 64},
        checkpoint={"everySteps": 1, "keepLast": keep},
        evaluation={"everySteps": 1, "keepBest": True},
        optim={"lr": 1e-3, "schedule": "constant"},
    )
    upload = Store.upload

    def slowly(self, files):
        time.sleep(0.2)
        upload(self, files)

    with monkeypatch.context() as patch:
        patch.setattr(Store, "upload", slowly)
        code, result, _ = in_pod("sft", spec)
    assert code == 0
    _, expected = run_phase("sft", spec, None, tmp_path / "local/run/sft")
    assert result.artifact_digest == expected.artifact_digest
    assert weights(bucket.path / "ws/run/sft") == weights(tmp_path / "local/run/sft")
    kept = {name.split("/")[0] for name in bucket.names("ws/run/sft/checkpoints")}
    best = {name for name in kept if name.startswith("best-")}
    assert kept - best == ({"step-6"} if keep else set())
    assert len(best) in ((1, 2) if keep else (0,)), "what the checkpoint needs, and what was found after it"


@pytest.mark.slow
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
    name = re.split(r"/s3\d+/", path.as_posix())[1]
    filesystem("s3").pipe_file(name, content[:-1] + bytes([content[-1] ^ 1]))


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: (folder / ".manifest.json").unlink(),
        lambda folder: truncate(folder / ".manifest.json"),
        lambda folder: (folder / "state.json").unlink(),
        lambda folder: truncate(folder / "shard-00000.safetensors"),
        lambda folder: flip(folder / "shard-00000.safetensors"),
        lambda folder: other(folder / "shard-00000.safetensors"),
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


def test_nodes_bring_each_other_the_shards_that_they_wrote(bucket, tmp_path):
    phases = [remote_phase(bucket, tmp_path / f"node-{n}") for n in range(3)]
    stored = [StoredCheckpoints(phase, None) for phase in phases]
    folders = [phase.dir.checkpoints / "best-1" for phase in phases]
    for node, folder in enumerate(folders[:2]):
        folder.mkdir(parents=True)
        (folder / "index.json").write_text("the same on every node")
        (folder / f"shard-0000{node}.safetensors").write_text(str(node))
    stored[0].open(folders[0])
    marks = stored[0].upload(folders[0], True) | stored[1].upload(folders[1], False)
    stored[1].fetch(folders[1])
    assert not (folders[1] / "shard-00000.safetensors").exists(), "it is not whole yet"
    stored[0].commit(folders[0], marks)
    for node, folder in zip(stored, folders, strict=True):
        node.fetch(folder)
        names = ["index.json", "shard-00000.safetensors", "shard-00001.safetensors"]
        assert sorted(path.name for path in folder.iterdir()) == names
        assert [(folder / name).read_text() for name in names[1:]] == ["0", "1"]


def remote_phase(bucket, workspace: Path) -> RemotePhase:
    return RemotePhase(Store(f"{bucket.uri}/ws"), workspace, PhaseDir(workspace / "run" / "sft"), "digest")


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


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "times"),
    [
        ("step-4/shard-00000.safetensors", 1),
        ("step-4/.manifest.json", 1),
        ("model/tokenizer.json", 1),
        (".index/", 1),
        ("result.json", 1),
    ],
)
def test_a_kill_between_two_objects_costs_nothing(in_pod, bucket, tiny_model_dir, local, tmp_path, name, times):
    process = start(tmp_path / "killed", sft(tiny_model_dir), f"{bucket.uri}/ws", killed_at(name, times))
    out, _ = process.communicate(timeout=900)
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
        (
            "s3://no-such-bucket/ws",
            "s3://no-such-bucket/ws/run/.writers/sft.json: The specified bucket does not exist.",
        ),
        ("gs://bucket/ws", "pip install gcsfs"),
        ("nfs://bucket/ws", "Protocol not known: nfs"),
        ("s3://b_/ws", "s3://b_/ws"),
    ],
)
def test_an_unusable_address_is_bad_input(in_pod, bucket, tiny_model_dir, capfd, remote, said):
    assert in_pod("sft", sft(tiny_model_dir), remote=remote)[0] == 2
    assert said in capfd.readouterr().err


@pytest.mark.slow
def test_a_server_that_is_down_is_infrastructure(in_pod, bucket, tiny_model_dir, monkeypatch, capfd):
    use(monkeypatch, f"http://127.0.0.1:{free_ports(1)[0]}")
    assert in_pod("sft", sft(tiny_model_dir))[0] == 75
    err = capfd.readouterr().err
    assert f"Infrastructure: {bucket.uri}/ws" in err and "check AWS_ENDPOINT_URL" in err


@pytest.mark.slow
def test_a_server_that_goes_down_is_noticed_and_nothing_is_lost(request, tiny_model_dir, tmp_path, monkeypatch):
    root = tmp_path / "s3"
    (root / "bucket").mkdir(parents=True)
    own = serve(root, free_ports(1)[0])
    request.addfinalizer(own.stop)
    use(monkeypatch, own.endpoint)
    spec = sft(tiny_model_dir, duration={"maxSteps": 400}, checkpoint={"everySteps": 5, "keepLast": 1})
    process = start(tmp_path / "a", spec, "s3://bucket/ws")
    folder = root / "bucket/ws/run/sft/checkpoints"
    wait_for(lambda: any(folder.glob("step-1?/.manifest.json")), process)
    own.stop()
    out, _ = process.communicate(timeout=900)
    assert process.returncode == 75, out.decode()
    assert "Infrastructure: s3://bucket/ws" in out.decode()
    again = serve(root, own.port)
    request.addfinalizer(again.stop)
    whole = [path.parent.name for path in folder.glob("*/.manifest.json")]
    assert whole
    process = start(tmp_path / "b", spec, "s3://bucket/ws")
    found = max(int(name.removeprefix("step-")) for name in whole)
    wait_for(lambda: number(tmp_path / "b/ws/run/sft", "step") > found, process)
    process.terminate()
    out, _ = process.communicate(timeout=900)
    assert process.returncode == 143, out.decode()
    assert min(steps(tmp_path / "b/ws/run/sft")) == 1, "its metrics came along"


def test_interrupted_work_that_cannot_be_uploaded_is_not_called_saved(
    in_pod, stop_after, tiny_model_dir, monkeypatch, capfd
):
    from trainers.contract import Infrastructure
    from trainers.remote.store import Store

    def fails(self, name, content):
        raise Infrastructure(f"{self.address(name)}: gone")

    monkeypatch.setattr(Store, "create", lambda self, *args: fails(self, *args) if "step-" in args[0] else None)
    with stop_after(1):
        code, _, _ = in_pod("sft", sft(tiny_model_dir))
    assert code == 75
    assert "saved" not in capfd.readouterr().err


def number(phase: Path, key: str) -> int:
    progress = PhaseDir(phase).read_progress()
    return getattr(progress, key) if progress else 0

"""Workspaces on an object store: what is reused, what comes by address, and what each phase type needs of it."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import remote_store
from cluster.processes import free_ports
from remote_store import ROWS, sft, start, wait_for, weights

from trainers.phase_dir import PhaseDir

# Fixtures.
server, bucket, in_pod = remote_store.server, remote_store.bucket, remote_store.in_pod


# ---------------------------------------------------------------- reuse


def trained(output: Path) -> bool:
    """Whether anything was computed in this pod's folder."""
    return (output / "progress.json").exists()


def test_a_finished_phase_ends_at_once_without_torch_and_without_the_model(in_pod, bucket, tiny_model_dir, tmp_path):
    in_pod("sft", sft(tiny_model_dir))
    no_torch = "import sys; sys.modules['torch'] = None"
    process = start(tmp_path / "again", sft(tiny_model_dir), f"{bucket.uri}/ws", no_torch)
    out, _ = process.communicate(timeout=900)
    assert process.returncode == 0, out.decode()
    assert not (tmp_path / "again/ws/run/sft").exists()


def test_without_a_store_its_libraries_are_not_imported():
    code = "import sys, trainers.launch; print({'fsspec', 's3fs', 'torch'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


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


def test_work_on_other_data_or_with_another_model_is_not_gone_on_with(in_pod, stop_after, bucket, tiny_model_dir):
    shutil.copytree(tiny_model_dir, bucket.path / "ws/models/tiny")
    (bucket.path / "ws/train.jsonl").write_text(ROWS)
    spec = sft("./models/tiny", data={"train": [{"files": "train.jsonl"}], "maxLength": 64})
    with stop_after(2):
        assert in_pod("sft", spec)[0] == 143
    (bucket.path / "ws/train.jsonl").write_text(ROWS.replace("copy", "sort"))
    code, first, output = in_pod("sft", spec)
    steps = [json.loads(line)["step"] for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert (code, steps) == (0, list(range(1, 7)))
    history = bucket.path / "ws/run/.history"
    assert len(list(history.glob("*/checkpoints/step-2/.manifest.json"))) == 1, "it is kept"
    assert not trained(in_pod("sft", spec)[2])

    config = bucket.path / "ws/models/tiny/generation_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"temperature": 0.5}))
    code, second, output = in_pod("sft", spec)
    assert code == 0 and trained(output)
    assert second.digest == first.digest and second.artifact_digest != first.artifact_digest


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


# ---------------------------------------------------------------- what each phase type reads and leaves

PAIRS = {"synthetic": {"task": "letters", "split": "preferences", "count": 48}}
PROMPTS = {"prompts": [{"synthetic": {"task": "letters", "split": "prompts", "count": 20}}], "maxPromptLength": 32}


def dpo(**changes) -> dict:
    base = {
        "policy": {"phase": "sft"},
        "data": {"train": [PAIRS], "eval": [PAIRS], "maxLength": 64},
        "batchSize": 16,
        "duration": {"maxSteps": 6},
        "optim": {"lr": 1e-2},
        "checkpoint": {"everySteps": 1, "keepLast": 1},
        "evaluation": {"everySteps": 1, "keepBest": True},
    }
    return {**base, **changes}


def rollout(reward: Path, **changes) -> dict:
    base = {
        "policy": {"phase": "sft"},
        "rewardModel": {"source": str(reward)},
        "data": PROMPTS,
        "sampling": {"maxNewTokens": 6, "batchSize": 4},
    }
    return {**base, **changes}


def evaluate(reward: Path, **changes) -> dict:
    base = {
        "models": [{"phase": "sft"}, {"phase": "dpo"}],
        "baseline": "sft",
        "rewardModel": {"source": str(reward)},
        "data": {
            "rows": [{"synthetic": {"task": "letters", "split": "test", "count": 16}}],
            "maxPromptLength": 32,
        },
        "sampling": {"maxNewTokens": 6, "temperature": 0},
        "benchmarks": [{"name": "reward", "reward": {}}, {"name": "length", "length": {}}],
        "latency": {"enabled": False},
    }
    return {**base, **changes}


@pytest.fixture(scope="module")
def local(run_phase, tiny_model_dir, tiny_reward_dir, tmp_path_factory):
    """The same pipeline in a shared folder: phase to its folder and result."""
    run = tmp_path_factory.mktemp("local") / "run"
    made: dict[str, Path] = {}
    for kind, spec in pipeline(tiny_model_dir, tiny_reward_dir).items():
        code, _ = run_phase(kind, spec, {name: made[name] for name in READS[kind]}, run / kind)
        assert code == 0
        made[kind] = run / kind
    return {kind: (path, PhaseDir(path).read_result()) for kind, path in made.items()}


READS: dict[str, tuple[str, ...]] = {
    "sft": (),
    "dpo": ("sft",),
    "rollout": ("sft",),
    "evaluate": ("sft", "dpo"),
    "package": ("sft", "dpo", "evaluate"),
}


def pipeline(model: Path, reward: Path) -> dict[str, dict]:
    return {
        "sft": sft(model),
        "dpo": dpo(),
        "rollout": rollout(reward),
        "evaluate": evaluate(reward),
        "package": {"title": "Letters"},
    }


def test_a_pipeline_where_every_phase_has_a_pod_of_its_own(in_pod, bucket, tiny_model_dir, tiny_reward_dir, local):
    for kind, spec in pipeline(tiny_model_dir, tiny_reward_dir).items():
        code, result, output = in_pod(kind, spec, inputs=READS[kind])
        assert code == 0
        path, expected = local[kind]
        assert result.metrics == expected.metrics
        assert result.digest == expected.digest
        if kind != "package":  # its report names the moment
            assert result.artifact_digest == expected.artifact_digest
        fetched = {p.name for p in output.parent.iterdir() if p.is_dir()} - {kind}
        assert fetched == set(READS[kind]), "what a phase does not read stays away"
        here = {p.relative_to(path).as_posix() for p in path.rglob("*") if p.is_file()} - {"progress.json"}
        there = {name for name in bucket.names(f"ws/run/{kind}") if not name.endswith(".manifest.json")}
        assert set(map(without_key, there)) == set(map(without_key, here))
    report = (bucket.path / "ws/run/package/report.html").read_text()
    assert report.count("<svg") == (local["package"][0] / "report.html").read_text().count("<svg") > 0
    assert (
        weights(bucket.path / "ws/run/sft")
        == (bucket.path / "ws/run/package/models/sft/model.safetensors").read_bytes()
    )


def without_key(name: str) -> str:
    """Reference scores are named after their model's files, with their times."""
    return "reference" if name.startswith("reference/") else name


@pytest.fixture
def with_sft(in_pod, tiny_model_dir):
    assert in_pod("sft", sft(tiny_model_dir))[0] == 0


def test_an_input_that_is_damaged_is_named(in_pod, bucket, with_sft, capfd):
    model = bucket.path / "ws/run/sft/model/model.safetensors"
    model.write_bytes(model.read_bytes()[:-8])
    assert in_pod("dpo", dpo(), inputs=["sft"])[0] == 2
    err = capfd.readouterr().err
    assert f"phase 'sft': {bucket.uri}/ws/run/sft/model is not what its result.json says" in err
    shutil.rmtree(bucket.path / "ws/run/sft/model")
    assert in_pod("dpo", dpo(), inputs=["sft"])[0] == 2


def test_an_input_that_is_gone_is_named(in_pod, bucket, with_sft, run_phase, tmp_path, capfd):
    output = tmp_path / "pod/run/dpo"
    file = {"remote": f"{bucket.uri}/ws", "inputs": {"sft": {"path": str(output.parent / "sft"), "digest": "d"}}}
    shutil.rmtree(bucket.path / "ws/run/sft")
    path = tmp_path / "phase.yaml"
    path.write_text(json.dumps({"output": str(output), "spec": dpo(), **file}))
    from trainers import launch

    assert launch.run_phase("dpo", path, []) == 2
    assert f"phase 'sft' has no result.json in {bucket.uri}/ws/run/sft" in capfd.readouterr().err


def test_the_references_scores_and_the_best_weights_come_along(in_pod, stop_after, with_sft, local, monkeypatch):
    from trainers.phases.dpo import reference

    with stop_after(4):
        assert in_pod("dpo", dpo(), inputs=["sft"])[0] == 143
    monkeypatch.setattr(reference, "_all_scores", None)  # would be called to score again
    code, result, output = in_pod("dpo", dpo(), inputs=["sft"])
    assert code == 0
    assert result.artifact_digest == local["dpo"][1].artifact_digest
    assert weights(output) == weights(local["dpo"][0])


def test_rollouts_go_on_behind_the_last_stored_batch(in_pod, bucket, with_sft, tiny_reward_dir, local, monkeypatch):
    from trainers.phases.rollout import run

    made = []
    respond = run.respond

    def counted(workers, loaded, prompts, *args):
        made.append(len(prompts))
        if len(made) == 3:
            raise OSError("the network is gone")
        return respond(workers, loaded, prompts, *args)

    monkeypatch.setattr(run, "respond", counted)
    assert in_pod("rollout", rollout(tiny_reward_dir), inputs=["sft"])[0] == 75
    assert {"part-000000000-000000004.jsonl", "part-000000004-000000008.jsonl"} == bucket.names(
        "ws/run/rollout/checkpoints"
    )
    code, result, _ = in_pod("rollout", rollout(tiny_reward_dir), inputs=["sft"])
    assert code == 0 and len(made) == 3 + 3
    assert result.artifact_digest == local["rollout"][1].artifact_digest
    assert not bucket.names("ws/run/rollout/checkpoints")


def test_an_evaluation_measures_nothing_twice(in_pod, bucket, with_sft, tiny_reward_dir, monkeypatch):
    """In another pod, after an edit, and in another run."""
    from trainers.phases.evaluate import bench

    measured = []
    respond = bench.respond

    def counted(*args):
        measured.append(1)
        return respond(*args)

    monkeypatch.setattr(bench, "respond", counted)
    spec = evaluate(tiny_reward_dir, models=[{"phase": "sft"}], baseline=None)
    assert in_pod("evaluate", spec, inputs=["sft"])[0] == 0
    assert len(measured) == 1
    edited = {**spec, "benchmarks": spec["benchmarks"][:1]}
    assert in_pod("evaluate", edited, inputs=["sft"])[0] == 0
    assert len(measured) == 1
    assert (bucket.path / "ws/run/.history").is_dir()
    shutil.copytree(bucket.path / "ws/run/sft", bucket.path / "ws/second/sft")
    renamed = {**spec, "benchmarks": [{"name": "again", "reward": {}}]}
    assert in_pod("evaluate", renamed, inputs=["sft"], run="second")[0] == 0
    assert len(measured) == 1


# ---------------------------------------------------------------- several nodes


@pytest.mark.slow
def test_two_nodes_with_a_folder_each(run_phase, bucket, with_sft, local, tmp_path):
    """Two torchruns of two processes; stopped in the middle, and gone on with in empty folders."""
    digest = PhaseDir(bucket.path / "ws/run/sft").read_result().artifact_digest
    spec = dpo(duration={"maxSteps": 40}, optim={"lr": 1e-3}, checkpoint={"everySteps": 2, "keepLast": 2})
    first = nodes(tmp_path / "first", spec, bucket, digest)
    wait_for(lambda: any(bucket.path.glob("ws/run/dpo/checkpoints/step-6/.manifest.json")), first[0])
    for process in first:
        process.terminate()
    for process in first:
        process.communicate(timeout=900)
    assert not (bucket.path / "ws/run/dpo/result.json").exists()
    shards = {p.name for p in (tmp_path / "first/node-1/run/dpo/checkpoints").glob("step-*/shard-*")}
    assert shards == {"shard-00002.safetensors", "shard-00003.safetensors"}, "each node writes and uploads its own"
    for process in nodes(tmp_path / "second", spec, bucket, digest):
        out, _ = process.communicate(timeout=900)
        assert process.returncode == 0, out.decode()
    steps = [
        (tmp_path / f"{name}/node-0/run/dpo/metrics.jsonl").read_text().splitlines() for name in ("first", "second")
    ]
    assert steps[1][0] == steps[0][0], "the first step was not made again"
    kept = {p.name for p in (tmp_path / "second/node-1/run/dpo/checkpoints").glob("step-*")}
    assert kept == {"step-38", "step-40"}, "which hold this node's shards"
    assert run_phase("dpo", spec, {"sft": local["sft"][0]}, tmp_path / "alone/run/dpo")[0] == 0
    ours, theirs = tensors(bucket.path / "ws/run/dpo"), tensors(tmp_path / "alone/run/dpo")
    assert max((ours[name] - theirs[name]).abs().max().item() for name in theirs) < 2e-5
    for process in nodes(tmp_path / "third", spec, bucket, digest):
        out, _ = process.communicate(timeout=900)
        assert process.returncode == 0, out.decode()
    assert not (tmp_path / "third/node-0/run/dpo/progress.json").exists(), "found finished by all processes"


def nodes(folder: Path, spec: dict, bucket, digest: str) -> list[subprocess.Popen]:
    """What the Training Operator tells two pods, with nothing in common but the network."""
    pet = {"NNODES": 2, "NPROC_PER_NODE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_ports(1)[0]}
    remote = f"{bucket.uri}/ws"
    return [node(folder / f"node-{rank}", {**pet, "NODE_RANK": rank}, spec, remote, digest) for rank in (0, 1)]


def node(workspace: Path, pet: dict, spec: dict, remote: str | None, digest: str) -> subprocess.Popen:
    """torchrun with these settings from the environment."""
    workspace.mkdir(parents=True, exist_ok=True)
    inputs = {"sft": {"path": str(workspace / "run/sft"), "digest": digest}}
    document = {"output": str(workspace / "run/dpo"), "spec": spec, "inputs": inputs, "remote": remote}
    file = workspace.with_suffix(".json")
    file.write_text(json.dumps(document))
    environment = {**os.environ, **{f"PET_{name}": str(value) for name, value in pet.items()}}
    environment |= {"OMP_NUM_THREADS": "1", "ALIGNMENT_METRICS_PORT": "0", "GLOO_SOCKET_IFNAME": "lo"}
    command = [sys.executable, "-m", "torch.distributed.run", "-m", "trainers", "dpo", "--spec", str(file)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def tensors(phase: Path) -> dict:
    from safetensors.torch import load_file

    return load_file(phase / "model/model.safetensors")

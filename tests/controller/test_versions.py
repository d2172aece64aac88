"""Operators and trainers of different versions: nothing that runs is stopped, nothing that has finished runs again.

The version before is what it has written: a status and phase files in the middle of a run (``versions/previous.json``). The
version after is this one's code with another number, another default and a setting more.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from another_version import look
from builders import artifact, dpo, make_run, reward, sft

from controller.api.run import AlignmentRun
from trainers import __version__
from trainers.contract import BadInput, Identity, PhaseFile, Result, Termination, digest_of
from trainers.phase_file import parse_spec, read_phase_file
from trainers.phases import phase_type

Object = dict[str, Any]
ROOT = Path(__file__).resolve().parents[2]
BEFORE: Object = json.loads((Path(__file__).parent / "versions/previous.json").read_text())
LATER = "7.0.0"
EDITS = {
    "trainers/__init__.py": (f'"{__version__}"', f'"{LATER}"'),
    "trainers/phases/dpo/spec.py": (
        "    beta: float = Field(default=0.1, gt=0)\n",
        '    warmth: float = 0.5\n    """New."""\n    beta: float = Field(default=0.2, gt=0)\n',
    ),
}


@pytest.fixture(scope="module")
def later(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """One look by the version after."""
    tree = tmp_path_factory.mktemp("later")
    for package in ("controller", "trainers"):
        shutil.copytree(ROOT / package, tree / package, ignore=shutil.ignore_patterns("__pycache__"))
    for name, (old, new) in EDITS.items():
        text = (tree / name).read_text()
        assert text.count(old) == 1
        (tree / name).write_text(text.replace(old, new))

    def ask(asked: Object) -> Object:
        program = [sys.executable, str(ROOT / "tests/controller/another_version.py")]
        done = subprocess.run(
            program, input=json.dumps(asked), capture_output=True, text=True, env={"PYTHONPATH": str(tree)}, check=True
        )
        return dict(json.loads(done.stdout))

    return ask


def write(folder: Path, document: Object) -> Path:
    path = folder / "phase.json"
    path.write_text(json.dumps(document))
    return path


def read(folder: Path, document: Object, kind: str, *changes: tuple[str, object]) -> tuple[PhaseFile, Any]:
    file = read_phase_file(write(folder, document), phase_type(kind), changes)
    return file, parse_spec(phase_type(kind), file)


def phases(status: Object) -> dict[str, Object]:
    return {phase["name"]: phase for phase in status["phases"]}


# ---------------------------------------------------------------- the version before


def of_before(**more: Any) -> Object:
    """The run in its middle, seen as it stands."""
    known = phases(BEFORE["status"])
    base = known["base"]
    jobs = [
        {"phase": "base", "attempt": 1, "digest": base["digest"], "state": "Succeeded"},
        {"phase": "dpo", "attempt": 1, "digest": known["dpo"]["digest"], "state": "Live"},
        {"phase": "reward", "attempt": 1, "digest": known["reward"]["digest"], "state": "Failed"},
        {"phase": "reward", "attempt": 2, "digest": known["reward"]["digest"], "state": "Live"},
    ]
    run = {**BEFORE["run"], "status": BEFORE["status"]}
    return {"run": run, "jobs": jobs, "results": {}, "at": 300, **more}


def test_a_run_in_the_middle_goes_on_after_an_upgrade() -> None:
    after = look(of_before())
    assert (after["started"], after["stopped"]) == ({}, [])
    old, new = phases(BEFORE["status"]), phases(after["status"])
    for name in ("base", "dpo", "reward"):
        assert (new[name]["state"], new[name]["digest"]) == (old[name]["state"], old[name]["digest"])
    assert new["base"]["artifactDigest"] == old["base"]["artifactDigest"]
    assert [a["state"] for a in new["reward"]["attempts"]] == ["Failed", "Running"]


@pytest.mark.parametrize("name", BEFORE["files"])
def test_its_phase_files_are_read_and_are_of_the_digest_it_waits_for(name: str, tmp_path: Path) -> None:
    phase, _ = name.split("-")
    kind = {"base": "sft"}.get(phase, phase)
    file, spec = read(tmp_path, BEFORE["files"][name], kind)
    assert digest_of(phase_type(kind), file, spec) == phases(BEFORE["status"])[phase]["digest"]


# ---------------------------------------------------------------- the version after

WRITTEN = {"outright": {"beta": 0.1}, "as the later default": {"beta": 0.2}, "not at all": {}}


def middle(**settings: Any) -> tuple[Object, dict[str, Object]]:
    """A run of two phases of which the first has finished and the second runs; and the phase files."""
    run = make_run(sft("base"), dpo("dpo", "base", **settings), workspace={"claimName": "work"}).model_dump(
        by_alias=True, mode="json", exclude_unset=True
    )
    run["metadata"]["generation"] = 1
    files: dict[str, Object] = {}
    first = look({"run": run, "jobs": [], "results": {}, "at": 0})
    digest = phases(first["status"])["base"]["digest"]
    done = {"phase": "base", "attempt": 1, "digest": digest, "state": "Succeeded"}
    run["status"] = first["status"]
    seen = {"jobs": [done], "results": {"base": [digest, artifact("base")]}}
    second = look({"run": run, **seen, "at": 100})
    files |= first["started"] | second["started"]
    live = {"phase": "dpo", "attempt": 1, "digest": phases(second["status"])["dpo"]["digest"], "state": "Live"}
    third = look({"run": {**run, "status": second["status"]}, "jobs": [done, live], "results": {}, "at": 110})
    return {"run": {**run, "status": third["status"]}, "jobs": [done, live], "results": {}, "at": 200}, files


@pytest.mark.parametrize("how", WRITTEN)
def test_a_later_operator_with_another_default_leaves_it_alone_and_so_does_this_one_after_it(
    how: str, later: Any
) -> None:
    asked, _ = middle(**WRITTEN[how])
    up = later(asked)
    assert (up["started"], up["stopped"]) == ({}, [])
    back = look({**asked, "run": {**asked["run"], "status": up["status"]}})
    assert (back["started"], back["stopped"]) == ({}, [])
    for status in (up["status"], back["status"]):
        assert {n: p["digest"] for n, p in phases(status).items()} == {
            n: p["digest"] for n, p in phases(asked["run"]["status"]).items()
        }


def test_an_edit_of_another_phase_reruns_nothing_either(later: Any) -> None:
    asked, _ = middle(beta=0.1)
    edited = make_run(
        sft("base"), dpo("dpo", "base", beta=0.1), reward("reward", "base"), workspace={"claimName": "work"}
    )
    run = edited.model_dump(by_alias=True, mode="json", exclude_unset=True)
    run |= {"status": asked["run"]["status"], "metadata": {"name": "test", "generation": 2}}
    up = later({**asked, "run": run})
    assert (list(up["started"]), up["stopped"]) == (["reward-1"], [])


def test_a_later_operators_phase_file_is_understood_and_its_digest_taken(later: Any, tmp_path: Path) -> None:
    """Although it would be another one by the defaults of here."""
    asked, _ = middle(beta=0.2)
    asked["run"].pop("status")
    done = asked["jobs"][0]
    run = {**asked["run"], "status": later({**asked, "jobs": [], "at": 0})["status"]}
    found = later({"run": run, "jobs": [done], "results": {"base": [done["digest"], artifact("base")]}, "at": 100})
    file, spec = read(tmp_path, found["started"]["dpo-1"], "dpo")
    kind = phase_type("dpo")
    assert (file.version, spec.beta) == (LATER, 0.2)
    assert digest_of(kind, file, spec) == phases(found["status"])["dpo"]["digest"]
    assert digest_of(kind, file.model_copy(update={"digest": ""}), spec) != file.digest


def test_a_setting_that_only_a_later_version_has_is_refused_by_the_names_of_both(later: Any, tmp_path: Path) -> None:
    asked, _ = middle()
    run: Object = asked["run"]
    run["spec"]["phases"][1]["dpo"]["warmth"] = 0.9
    run.pop("status")
    run["status"] = later({**asked, "run": run, "jobs": [], "at": 0})["status"]
    done = asked["jobs"][0]
    found = later({"run": run, "jobs": [done], "results": {"base": [done["digest"], artifact("base")]}, "at": 100})
    with pytest.raises(BadInput) as refused:
        read(tmp_path, found["started"]["dpo-1"], "dpo")
    said = str(refused.value)
    assert said == (
        f"dpo: warmth: Extra inputs are not permitted (got '0.9'); this trainer is version {__version__}, the phase file was "
        f"written by version {LATER}: use an image of that version, or leave the setting out"
    )


def test_where_to_write_is_never_passed_over(tmp_path: Path) -> None:
    _, files = middle()
    with pytest.raises(
        BadInput, match=rf"elsewhere: Extra .*this trainer is version {__version__}, .* by version {LATER}"
    ):
        read(tmp_path, {**files["base-1"], "version": LATER, "elsewhere": "s3://bucket"}, "sft")


def test_a_phase_file_says_only_what_is_set(tmp_path: Path) -> None:
    _, files = middle(beta=0.2)
    assert set(files["dpo-1"]["spec"]) == {"policy", "data", "beta", "seed"}
    assert files["dpo-1"]["version"] == __version__


def test_a_digest_is_that_of_the_file_as_it_was_written(tmp_path: Path) -> None:
    """Somebody may edit it, or change a setting on the command line."""
    _, files = middle()
    kind = phase_type("dpo")
    file, spec = read(tmp_path, files["dpo-1"], "dpo", ("optim.lr", 1e-05))
    assert digest_of(kind, file, spec) != files["dpo-1"]["digest"]
    file, spec = read(tmp_path, files["dpo-1"], "dpo")
    assert digest_of(kind, file, spec) == files["dpo-1"]["digest"]


# ---------------------------------------------------------------- what phases leave


@pytest.mark.parametrize(
    "record",
    [
        Termination(digest="d", artifact_digest="a", metrics={"loss": 1.0}),
        Identity(digest="d"),
        Result(run="r", phase="p", type="sft", digest="d", artifact_digest="a"),
    ],
    ids=lambda record: type(record).__name__,
)
def test_what_a_later_trainer_says_besides_is_passed_over(record: Any) -> None:
    assert type(record).model_validate({**record.document(), "later": {"than": 1}}) == record


def test_a_run_is_read_as_strictly_as_ever() -> None:
    with pytest.raises(ValueError, match="later"):
        AlignmentRun.model_validate({**BEFORE["run"], "later": 1})

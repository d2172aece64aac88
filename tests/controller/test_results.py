"""Finished and unfinished work in a workspace: what of it still holds."""

import json
from pathlib import Path
from typing import Any

import pytest
from builders import make_run, sft

from controller.backends.local.results import Results
from controller.plan.observed import Unfinished
from controller.plan.resolve import ResolvedPhase, resolve
from trainers.contract import Identity, Result, phase_digest
from trainers.files import write_atomic
from trainers.origins import origins_of
from trainers.phase_dir import PhaseDir


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "response": "b"}\n')
    return tmp_path / "rows.jsonl"


def phase_of(**settings: Any) -> ResolvedPhase:
    (phase,) = resolve(make_run(sft("base", data={"train": [{"files": "rows.jsonl"}]}, **settings)))
    return phase


def identity(phase: ResolvedPhase, base_dir: Path) -> Identity:
    digest = phase_digest(phase.type.name, phase.spec, phase.image, {})
    return Identity(digest=digest, origins=origins_of(phase.type, phase.spec, base_dir))


def leave(root: Path, phase: ResolvedPhase, base_dir: Path, **more: Any) -> Result:
    """A result as the phase would leave it now."""
    made = identity(phase, base_dir)
    result = Result(
        run="test", phase="base", type=phase.type.name, digest=made.digest, artifact_digest="a", origins=made.origins,
        settings=phase.spec.document(), **more,
    )  # fmt: skip
    write_atomic(PhaseDir(root).result, json.dumps(result.document()))
    return result


def test_a_result_holds_while_what_it_was_made_of_is_the_same(tmp_path: Path, rows: Path) -> None:
    phase, root = phase_of(), tmp_path / "runs/test/base"
    leave(root, phase, tmp_path)
    found = Results(tmp_path / "runs", tmp_path).of_phase(root, phase.type, phase.spec)
    assert found is not None and found.stale is None
    rows.write_text('{"prompt": "a", "response": "c"}\n')
    found = Results(tmp_path / "runs", tmp_path).of_phase(root, phase.type, phase.spec)
    assert found is not None and found.stale == "data.train[0] changed"
    rows.unlink()
    found = Results(tmp_path / "runs", tmp_path).of_phase(root, phase.type, phase.spec)
    assert found is not None and found.stale == "its data is not there any more"


def test_a_result_of_another_run_is_found_by_what_can_change_it(tmp_path: Path, rows: Path) -> None:
    result = leave(tmp_path / "runs/other/sft", phase_of(), tmp_path)
    wanted = {"parallel": {"microBatchTokens": 64}, "gates": [{"metric": "parameters", "atLeast": 1}]}
    same, different = phase_of(**wanted), phase_of(seed=3)
    results = Results(tmp_path / "runs", tmp_path)
    assert list(results.by_digest([same])) == [result.digest]
    assert not results.by_digest([different])
    own = tmp_path / "runs/test/base"
    assert results.finished(own, result.digest, same.type, same.spec) == tmp_path / "runs/other/sft"
    rows.write_text("{}\n")
    results = Results(tmp_path / "runs", tmp_path)
    assert not results.by_digest([same])
    assert results.finished(own, result.digest, same.type, same.spec) is None


def test_what_another_run_read_from_the_hub_is_left_to_the_phase(tmp_path: Path, rows: Path) -> None:
    phase, root = phase_of(), tmp_path / "runs/other/sft"
    result = leave(root, phase, tmp_path, commits={"model": "org/name@" + "0" * 40})
    results = Results(tmp_path / "runs", tmp_path)
    assert results.finished(tmp_path / "runs/test/base", result.digest, phase.type, phase.spec) is None
    assert results.finished(root, result.digest, phase.type, phase.spec) == root


def test_unfinished_work_says_why_it_does_not_count(tmp_path: Path, rows: Path) -> None:
    phase, root = phase_of(), tmp_path / "runs/test/base"
    made = identity(phase, tmp_path)
    write_atomic(PhaseDir(root).identity, json.dumps(made.document()))
    (PhaseDir(root).checkpoints / "step-7").mkdir(parents=True)
    found = Results(tmp_path / "runs", tmp_path).unfinished(root, phase.type, phase.spec)
    assert found == Unfinished(made.digest, 7)
    rows.write_text("{}\n")
    found = Results(tmp_path / "runs", tmp_path).unfinished(root, phase.type, phase.spec)
    assert found == Unfinished(made.digest, 7, "data.train[0] changed")

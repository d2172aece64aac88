"""The phase contract: digests, atomic writing, history, reuse, termination messages."""

import json
import math
import multiprocessing
import os
import signal
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainers import contract, files, phase_dir
from trainers.contract import FAILURES, FailureClass, Result, Termination
from trainers.gates import check_gates
from trainers.phase_dir import PhaseDir
from trainers.phases import REGISTRY
from trainers.phases.dpo.spec import DpoSpec


def dpo(**changes):
    return DpoSpec.model_validate({"policy": {"phase": "sft"}, "data": {"train": [{"files": "a.jsonl"}]}, **changes})


def finished(root: Path, digest: str, text: str = "weights") -> PhaseDir:
    directory = PhaseDir(root)
    directory.model.mkdir(parents=True)
    (directory.model / "w").write_text(text)
    result = Result(run="r", phase=root.name, type="sft", digest=digest, artifact_digest="a" + digest)
    files.write_atomic(directory.result, json.dumps(result.document()))
    return directory


class TestDigest:
    def test_writing_a_default_out_changes_nothing(self):
        assert digest(dpo()) == digest(dpo(beta=0.1, loss="sigmoid", parallel={"precision": "auto"}))

    @pytest.mark.parametrize("change", [{"beta": 0.2}, {"seed": 1}, {"data": {"train": [{"files": "b.jsonl"}]}}])
    def test_a_setting_that_matters_changes_it(self, change):
        assert digest(dpo()) != digest(dpo(**change))

    def test_checkpointing_and_logging_do_not(self):
        assert digest(dpo()) == digest(dpo(checkpoint={"everySteps": 5}, tracking={"logEvery": 10}))

    def test_inputs_and_image_do(self):
        known = {digest(dpo()), digest(dpo(), inputs={"sft": "2"}), digest(dpo(), image="v2")}
        assert len(known) == 3


def digest(spec, image="", inputs=None):
    return contract.phase_digest("dpo", spec, image, inputs or {"sft": "1"})


class TestTermination:
    @given(st.text(max_size=9000), st.dictionaries(st.text(max_size=60), st.floats(allow_nan=False), max_size=200))
    def test_fits_in_what_kubernetes_keeps_and_stays_json(self, message, metrics):
        text = contract.termination_json(Termination(failure="BadInput", message=message, metrics=metrics))
        assert len(text.encode()) <= contract.TERMINATION_LIMIT
        assert json.loads(text)["failure"] == "BadInput"

    @pytest.mark.parametrize("char", ["\x1b", "\n", "\\", "😀"])
    def test_a_long_message_of_characters_that_are_written_as_six_bytes_fits_too(self, char):
        text = contract.termination_json(Termination(failure="BadInput", message=char * 9000))
        assert len(text) <= contract.TERMINATION_LIMIT
        assert json.loads(text)["failure"] == "BadInput"

    def test_exit_codes_are_distinct_and_in_range(self):
        codes = [failure.code for failure in FAILURES.values() if failure.code is not None]
        assert len(set(codes)) == len(codes)
        assert set(FAILURES) == set(FailureClass)
        assert all(1 <= code <= 255 for code in codes)


class TestHistory:
    def test_an_edit_displaces_and_never_deletes(self, tmp_path):
        root = tmp_path / "run" / "sft"
        finished(root, "d1", "first")
        assert phase_dir.set_aside(root) == phase_dir.history_dir(root, "d1")
        assert not root.exists()
        assert (phase_dir.history_dir(root, "d1") / "model" / "w").read_text() == "first"

    def test_displacing_the_same_digest_twice_keeps_both(self, tmp_path):
        root = tmp_path / "run" / "sft"
        for _ in range(2):
            finished(root, "d1")
            phase_dir.set_aside(root)
        assert len(list((tmp_path / "run" / phase_dir.HISTORY).iterdir())) == 2

    def test_a_result_is_found_in_other_runs_and_in_the_history(self, tmp_path):
        finished(tmp_path / "other" / "sft", "d1")
        root = tmp_path / "run" / "sft"
        finished(root, "d2")
        phase_dir.set_aside(root)
        assert list(phase_dir.find_finished(tmp_path, "d1")) == [tmp_path / "other" / "sft"]
        assert list(phase_dir.find_finished(tmp_path, "d2")) == [phase_dir.history_dir(root, "d2")]
        assert list(phase_dir.find_finished(tmp_path, "d3")) == []

    def test_adopting_leaves_the_source_and_sets_the_old_content_aside(self, tmp_path):
        source = finished(tmp_path / "other" / "sft", "d1", "good").root
        root = tmp_path / "run" / "sft"
        finished(root, "d2", "old")
        phase_dir.adopt(source, root)
        assert PhaseDir(root).read_result().digest == "d1"
        assert (root / "model" / "w").read_text() == (source / "model" / "w").read_text() == "good"
        assert (phase_dir.history_dir(root, "d2") / "model" / "w").read_text() == "old"

    def test_a_damaged_result_without_a_digest_can_be_set_aside(self, tmp_path):
        (tmp_path / "run" / "sft").mkdir(parents=True)
        (tmp_path / "run" / "sft" / "result.json").write_text("{")
        assert phase_dir.set_aside(tmp_path / "run" / "sft").name == "sft-damaged"

    @pytest.mark.parametrize("content", [b"", b"{", b"{}", b"[]", b'{"run": 1}', b"\xff\xfe\x00"])
    def test_damaged_files_count_as_absent(self, tmp_path, content):
        (tmp_path / "result.json").write_bytes(content)
        (tmp_path / "progress.json").write_bytes(content + b"x")
        assert PhaseDir(tmp_path).read_result() is None
        assert PhaseDir(tmp_path).read_progress() is None


def _write_for_ever(path: str) -> None:
    number = 0
    while True:
        number += 1
        files.write_atomic(Path(path), json.dumps({"number": number, "filler": "x" * 20_000}))


def _commit_for_ever(root: str) -> None:
    number = 0
    while True:
        number += 1
        temporary = Path(root) / ".new"
        temporary.mkdir(exist_ok=True)
        for name in "abc":
            (temporary / name).write_text(str(number) * 1000)
        files.commit_directory(temporary, Path(root) / "final")


class TestKill:
    """A reader sees the old content or the new, whenever the writer is killed."""

    @pytest.mark.parametrize("after", [0.05, 0.1, 0.15])
    def test_a_file_is_never_torn(self, tmp_path, after):
        target = tmp_path / "f.json"
        kill_after(after, target, _write_for_ever, str(target))
        assert json.loads(target.read_text())["number"] >= 1

    @pytest.mark.parametrize("after", [0.05, 0.1, 0.15])
    def test_a_directory_is_never_torn(self, tmp_path, after):
        kill_after(after, tmp_path / "final", _commit_for_ever, str(tmp_path))
        if (tmp_path / "final").exists():
            assert len({(tmp_path / "final" / name).read_text() for name in "abc"}) == 1
        else:  # killed between the two renames: the old one still lies beside
            assert list(tmp_path.glob(".final.*.old"))


def kill_after(seconds: float, written: Path, target, *args) -> None:
    """Kill the writer some time after what it writes is there for the first time."""
    process = multiprocessing.get_context("fork").Process(target=target, args=args)
    process.start()
    deadline = time.monotonic() + 60
    while not written.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(seconds)
    os.kill(process.pid, signal.SIGKILL)
    process.join()


class TestGates:
    def test_every_missed_metric_is_named_with_value_and_threshold(self):
        spec = dpo(
            gates=[{"metric": "acc", "atLeast": 0.8}, {"metric": "kl", "atMost": 1}, {"metric": "ok", "atLeast": 0}]
        )
        with pytest.raises(contract.GateFailed, match=r"acc is 0.5, must be at least 0.8; kl is 2, must be at most 1"):
            check_gates(spec.gates, {"acc": 0.5, "kl": 2.0, "ok": 1.0})

    def test_nan_misses(self):
        with pytest.raises(contract.GateFailed):
            check_gates(dpo(gates=[{"metric": "kl", "atMost": 1}]).gates, {"kl": float("nan")})

    def test_a_metric_without_a_value_misses_and_those_with_one_are_listed(self):
        with pytest.raises(contract.GateFailed, match="acc has no value; there are kl"):
            check_gates(dpo(gates=[{"metric": "acc", "atLeast": 1}]).gates, {"kl": 1.0})


@pytest.mark.parametrize("entry", REGISTRY, ids=lambda entry: entry.name)
def test_every_field_of_every_phase_is_documented(entry):
    from pydantic import BaseModel

    def walk(model):
        for name, field in model.model_fields.items():
            assert field.description, f"{model.__name__}.{name} has no description"
            for kind in [field.annotation, *getattr(field.annotation, "__args__", ())]:
                if isinstance(kind, type) and issubclass(kind, BaseModel):
                    walk(kind)

    walk(entry.spec)


def models_in(kind):
    """Every pydantic model that a type is made of."""
    from typing import get_args

    from pydantic import BaseModel

    for part in get_args(kind):
        yield from models_in(part)
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        yield kind
        for field in kind.model_fields.values():
            yield from models_in(field.annotation)


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_no_setting_takes_what_is_no_number(number):
    """YAML has words for them (`.nan`, `.inf`), and 1e999 is one too."""
    from typing import get_args

    from pydantic import ValidationError

    from controller.api.run import RunSpec

    kinds = {model for kind in [RunSpec, *(entry.spec for entry in REGISTRY)] for model in models_in(kind)}
    fields = [
        (m, name)
        for m in kinds
        for name, f in m.model_fields.items()
        if float in (f.annotation, *get_args(f.annotation))
    ]
    assert len(fields) > 40
    for model, name in fields:
        with pytest.raises(ValidationError) as refused:
            model.__pydantic_validator__.validate_assignment(model.model_construct(), name, number)
        assert "finite_number" in {error["type"] for error in refused.value.errors()}, (model.__name__, name)

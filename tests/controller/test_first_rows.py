"""Data that a phase could not read is named before anything starts."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from builders import document, dpo, ppo, reward, sft

from controller.api.problems import InvalidRun
from controller.commands.run import report_rows
from controller.compose import merge
from controller.preflight import load_run
from trainers import jsonl
from trainers.contract import DataRecord

PAIR = {"prompt": "q", "chosen": "c", "rejected": "r"}
ALPACA = {"instruction": "q", "output": "a"}


def problems(run: dict[str, Any], folder: Path) -> list[str]:
    try:
        load_run(run, folder)
    except InvalidRun as error:
        return [str(problem) for problem in error.problems]
    return []


def reading(phase: dict[str, Any], member: str, data: dict[str, Any]) -> dict[str, Any]:
    return merge(phase, {member: {"data": data}})  # type: ignore[no-any-return]


BASE = sft("base")
FILES: dict[str, tuple[list[dict[str, Any]], dict[str, Any], str]] = {
    "alpaca for sft": (
        [BASE, reading(sft("x", "base"), "sft", {"train": [{"files": "d.jsonl"}]})],
        ALPACA,
        "spec.phases[x].sft.data.train[0]: {}:1: key 'prompt' is missing; sft rows need prompt, response; "
        "its keys are those of `format: alpaca`",
    ),
    "preferences": (
        [BASE, reading(dpo("x", "base"), "dpo", {"train": [{"files": "d.jsonl"}]})],
        {"prompt": "q", "chosen": "c"},
        "spec.phases[x].dpo.data.train[0]: {}:1: key 'rejected' is missing",
    ),
    "margins": (
        [BASE, merge(reading(reward("x", "base"), "reward", {"train": [{"files": "d.jsonl"}]}), {"reward": {"useMargin": True}})],
        PAIR,
        "spec.phases[x].reward.data.train[0]: {}:1: key 'margin' is missing",
    ),
    "prompts": (
        [BASE, reward("r", "base"), reading(ppo("x", "base", "r"), "ppo", {"prompts": [{"files": "d.jsonl"}]})],
        {"text": "q"},
        "spec.phases[x].ppo.data.prompts[0]: {}:1: key 'prompt' is missing; prompt rows need prompt; this one has 'text'",
    ),
    "rows of a benchmark": (
        [BASE, {"name": "x", "evaluate": {"models": [{"phase": "base"}], "data": {"rows": [{"files": "d.jsonl"}]}}}],
        {"messages": []},
        "spec.phases[x].evaluate.data.rows[0]: {}:1: messages must be a non-empty list",
    ),
    "traces": (
        [
            BASE,
            {
                "name": "x",
                "distill": {
                    "teacher": {"phase": "base"},
                    "student": {"phase": "base"},
                    "traces": {"files": "d.jsonl"},
                    "onPolicyFraction": 0,
                },
            },
        ],
        {"prompt": "q", "teacher_response": "a"},
        "spec.phases[x].distill.traces: {}:1: key 'reward' is missing",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_the_first_row_of_a_file_is_named(name: str, tmp_path: Path) -> None:
    phases, row, expected = FILES[name]
    path = tmp_path / "d.jsonl"
    path.write_text(jsonl.dump(row))
    (found,) = problems(document(*phases), tmp_path)
    assert found.startswith(expected.format(path))


def test_synthetic_rows_of_another_kind_are_named(tmp_path: Path) -> None:
    made = {"synthetic": {"task": "letters", "split": "preferences", "count": 8}}
    run = document(BASE, reading(sft("x", "base"), "sft", {"train": [made]}))
    (found,) = problems(run, tmp_path)
    assert found.startswith(
        "spec.phases[x].sft.data.train[0]: synthetic letters/preferences: key 'response' is missing"
    )


def one(**data: Any) -> dict[str, Any]:
    return document(
        BASE, reading(sft("x", "base"), "sft", {"train": [{"files": "d.jsonl*", **data.pop("source", {})}], **data})
    )


def test_a_format_makes_rows_right(tmp_path: Path) -> None:
    (tmp_path / "d.jsonl.gz").write_bytes(gzip.compress(jsonl.dump(ALPACA).encode()))
    assert problems(one(source={"format": "alpaca"}), tmp_path) == []
    assert len(problems(one(), tmp_path)) == 1
    (unknown,) = problems(one(source={"format": "alpca"}), tmp_path)
    assert 'train[0].format: "alpca"' in unknown


@pytest.mark.parametrize(("good", "expected"), [(1, 0), (0, 1)])
def test_rows_that_are_skipped_are_named_if_there_are_no_others(tmp_path: Path, good: int, expected: int) -> None:
    (tmp_path / "d.jsonl").write_text("{\n" * 3 + jsonl.dump({"prompt": "q", "response": "a"}) * good)
    assert len(problems(one(onMalformed="skip"), tmp_path)) == expected
    assert len(problems(one(), tmp_path)) == 1


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "d.jsonl.gz").write_bytes(b"no gzip")
    (found,) = problems(one(), tmp_path)
    assert "d.jsonl.gz:1: cannot be read from here on: damaged gzip file" in found


@pytest.mark.parametrize(("name", "content"), [("d.jsonl", ""), ("d.jsonl", "\n\n"), ("d.json", "[]")])
def test_a_file_without_rows_is_named(tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / name).write_text(content)
    assert problems(one(source={"files": name}), tmp_path) == [
        f'spec.phases[x].sft.data.train[0]: "{name}" holds no rows'
    ]


def test_an_empty_file_beside_others_is_none_of_their_problem(tmp_path: Path) -> None:
    (tmp_path / "d.jsonl").write_text("")
    (tmp_path / "d.jsonl2").write_text(jsonl.dump({"prompt": "q", "response": "a"}))
    assert problems(one(), tmp_path) == []


def test_it_looks_at_the_beginning_only(tmp_path: Path) -> None:
    good = jsonl.dump({"prompt": "q", "response": "a"})
    (tmp_path / "d.jsonl").write_text(good * 50 + "{\n")
    assert problems(one(), tmp_path) == []


def test_the_run_says_at_its_end_which_rows_were_not_used(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = load_run(document(BASE, sft("x", "base"), sft("unfinished", "base")))
    records = {
        "base": DataRecord(source="data.train[0]", fingerprint="", rows=8),
        "x": DataRecord(source="data.train[0]", fingerprint="", rows=6, dropped=2, shortened=1),
    }
    for name, record in records.items():
        place = {"run": "test", "phase": name, "type": "sft", "digest": "d", "artifactDigest": "a"}
        (tmp_path / "test" / name).mkdir(parents=True)
        (tmp_path / "test" / name / "result.json").write_text(json.dumps({**place, "data": [record.document()]}))
    report_rows(run, tmp_path)
    assert capsys.readouterr().out == "x: data.train[0]: 6 of 8 rows used, 2 dropped (too long), 1 used in part\n"

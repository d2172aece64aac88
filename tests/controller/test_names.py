"""Names that no file can have, and texts that are no names: one line each, whatever they are."""

from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from builders import DATA, document, dpo, sft
from hypothesis import given, settings
from hypothesis import strategies as st

from controller.api.problems import InvalidRun
from controller.preflight import load_run

LONG = "x" * 300
NAMES = {
    "a name": LONG,
    "a folder": f"./{LONG}",
    "a hub id": f"org/{LONG}",
    "a whole path": f"/tmp/{LONG}/{LONG}",
    "a path that is too long as a whole": "/".join(["." + "y" * 99] * 60),
}


def with_model(source: str) -> dict[str, Any]:
    return document({"name": "base", "sft": {"model": {"source": source}, "data": DATA}})


def with_reward_model(source: str) -> dict[str, Any]:
    reward = {"policy": {"phase": "base"}, "rewardModel": {"source": source}, "data": {"prompts": DATA["train"]}}
    return document(sft("base"), {"name": "last", "rollout": reward})


def with_files(files: str) -> dict[str, Any]:
    return document(sft("base", data={"train": [{"files": files}]}))


def with_traces(files: str) -> dict[str, Any]:
    models = {"teacher": {"phase": "base"}, "student": {"phase": "base"}}
    return document(
        sft("base"), {"name": "last", "distill": {**models, "traces": {"files": files}, "onPolicyFraction": 0}}
    )


def with_run_model(source: str) -> dict[str, Any]:
    return document({"name": "base", "sft": {"data": DATA}}, model={"source": source})


PLACES = {
    "model": (with_model, "model.source"),
    "the run's model": (with_run_model, "spec.model.source"),
    "reward model": (with_reward_model, "rewardModel.source"),
    "data": (with_files, "data.train[0].files"),
    "traces": (with_traces, "traces.files"),
}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("place", PLACES)
def test_a_name_that_is_too_long_is_a_problem_in_one_short_line(place: str, name: str, tmp_path: Path) -> None:
    make, path = PLACES[place]
    with pytest.raises(InvalidRun) as raised:
        load_run(make(NAMES[name]), tmp_path)
    lines = [str(problem) for problem in raised.value.problems]
    assert any(f"{path}: " in line for line in lines)
    assert all("\n" not in line for line in lines)


@settings(deadline=None, max_examples=200)
@given(st.sampled_from(sorted(PLACES)), st.text(min_size=1, max_size=400))
def test_any_text_is_a_name_or_a_problem(place: str, text: str) -> None:
    with suppress(InvalidRun):
        load_run(PLACES[place][0](text), Path("."))


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b'{"model": 1}', b"\xff\xfe", b"[" * 100_000, b'{"added_tokens": [1]}']
)
def test_a_damaged_tokenizer_is_a_problem_of_the_field_that_names_its_folder(content: bytes, tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
        (tmp_path / name / "tokenizer.json").write_bytes(content)
    run = dpo("dpo", "base", policy={"source": "./one"}, reference={"source": "./two"})
    with pytest.raises(InvalidRun) as problem:
        load_run(document(sft("base"), run), tmp_path)
    for field in ('dpo.policy.source: "./one"', 'dpo.reference.source: "./two"'):
        assert f"spec.phases[dpo].{field} holds no model that can be loaded: tokenizer.json: " in str(problem.value)

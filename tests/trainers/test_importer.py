"""`alignctl import`: what it writes is read by the phases, and what it cannot read is one line."""

import gzip
import json

import pytest
from typer.testing import CliRunner

from controller import cli
from controller.api.problems import InvalidRun
from trainers import jsonl
from trainers.core.rows import read_rows
from trainers.formats import FORMATS
from trainers.spec import DataSource, RowPolicy

HH = "\n\nHuman: q\n\nAssistant: {}"
SOURCES = {
    "alpaca": ("sft", {"instruction": "q", "input": "", "output": "a\u2028b"}),
    "sharegpt": ("sft", {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}),
    "messages": ("prompt", {"messages": [{"role": "user", "content": "q"}]}),
    "preference-messages": (
        "preference",
        {
            "prompt": "q",
            "chosen": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "c"}],
            "rejected": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "r"}],
        },
    ),
    "hh": ("preference", {"chosen": HH.format("c"), "rejected": HH.format("r")}),
    "prompt-completion": ("sft", {"prompt": "q", "completion": "a"}),
}


def run(*arguments):
    result = CliRunner().invoke(cli.app, ["import", *map(str, arguments)], catch_exceptions=True)
    if isinstance(result.exception, InvalidRun):
        return [str(problem) for problem in result.exception.problems]
    assert result.exit_code == 0, result.output
    return result.output


@pytest.mark.parametrize("form", ["d.jsonl", "d.jsonl.gz", "d.json"])
@pytest.mark.parametrize("name", FORMATS)
def test_what_it_writes_is_what_the_phases_read_from_the_source(tmp_path, name, form):
    schema, row = SOURCES[name]
    text = json.dumps([row, row], indent=1) if form == "d.json" else jsonl.dumps([row, row])
    (tmp_path / form).write_bytes(gzip.compress(text.encode()) if form.endswith("gz") else text.encode())
    target = tmp_path / ("out.jsonl.gz" if form.endswith("gz") else "out.jsonl")
    assert run(name, tmp_path / form, target) == f"{target}: 2 {schema} rows\n"
    direct, imported = (
        read_rows([source], schema, tmp_path, RowPolicy(), "d").rows
        for source in (DataSource(files=form, format=name), DataSource(files=target.name))
    )
    assert direct == imported
    assert len(direct) == 2


def test_shards_become_one_file_and_columns_are_renamed(tmp_path):
    for i in range(3):
        (tmp_path / f"d-{i}.jsonl").write_text(jsonl.dumps([{"question": f"q{i}", "output": "a"}]))
    run("alpaca", tmp_path / "d-*.jsonl", tmp_path / "o.jsonl", "--column", "instruction=question")
    assert [row["prompt"] for row in jsonl.read(tmp_path / "o.jsonl")] == ["q0", "q1", "q2"]


def test_a_malformed_row_stops_it_or_is_left_out(tmp_path):
    source, target = tmp_path / "d.jsonl", tmp_path / "o.jsonl"
    good = {"instruction": "q", "output": "a"}
    source.write_text("{\n" + jsonl.dumps([good, {"instruction": "q"}, good]))
    assert run("alpaca", source, target)[0].startswith(f"{source}:1: not valid JSON")
    assert not target.exists()
    assert run("alpaca", source, target, "--skip").startswith(
        f"{target}: 2 sft rows, 2 skipped; the first: {source}:1:"
    )
    source.write_text("{\n")
    assert run("alpaca", source, target, "--skip")[0].startswith(f"{source}: no usable rows; the first: {source}:1:")


def test_every_other_fault_is_one_line(tmp_path):
    source = tmp_path / "d.jsonl"
    source.write_text(jsonl.dumps([SOURCES["alpaca"][1]]))
    assert run("alpca", source, tmp_path / "o.jsonl") == [
        f'"alpca" is not a format; formats are: {", ".join(FORMATS)} (did you mean alpaca?)'
    ]
    assert run("sharegpt", source, tmp_path / "o.jsonl")[0].endswith("its keys are those of `format: alpaca`")
    assert run("alpaca", tmp_path / "x.jsonl", tmp_path / "o.jsonl")[0].startswith("no file matches")
    assert run("alpaca", source, source) == [f"{source} is read and cannot be written: give the target another name"]
    assert run("alpaca", source, "o", "--column", "x")[0].startswith('--column: "x" is not KEY=COLUMN')
    (tmp_path / "file").write_text("")
    assert run("alpaca", source, tmp_path / "file" / "o.jsonl")[0].endswith(("File exists", "Not a directory"))


def test_a_list_in_a_json_file_that_is_no_json_is_named_by_its_line(tmp_path):
    (tmp_path / "d.json").write_text('\n[\n {"instruction": "q",\n\n "output": }\n]')
    assert run("alpaca", tmp_path / "d.json", tmp_path / "o.jsonl") == [
        f"{tmp_path}/d.json: not valid JSON (Expecting value at line 5, column 12)"
    ]


def test_json_files_may_hold_lines_too(tmp_path):
    (tmp_path / "d.json").write_text(jsonl.dumps([SOURCES["alpaca"][1]] * 3))
    assert run("alpaca", tmp_path / "d.json", tmp_path / "o.jsonl").endswith(": 3 sft rows\n")


def turns(*roles):
    return [{"role": role, "content": role[0]} for role in roles]


MIXED = {
    "messages": ({"messages": turns("user")}, {"messages": turns("user", "assistant")}),
    "alpaca": ({"instruction": "q"}, {"instruction": "q", "output": "a"}),
    "prompt-completion": ({"prompt": "q", "completion": []}, {"prompt": "q", "completion": "a"}),
    "sharegpt": tuple(
        {"conversations": [{"from": f, "value": f} for f in said]} for said in (["human"], ["human", "gpt"])
    ),
}


@pytest.mark.parametrize("name", MIXED)
def test_no_answer_is_lost_because_the_first_row_has_none(tmp_path, name):
    source, target = tmp_path / "d.jsonl", tmp_path / "o.jsonl"
    asked, answered = MIXED[name]
    source.write_text(jsonl.dumps([asked] + [answered] * 5))
    (problem,) = run(name, source, target)
    assert problem.startswith(f"{source}:1: ")
    assert problem.endswith(f"; this is a prompt row, and {source}:2 a sft row: split them")
    assert not target.exists()
    assert run(name, source, target, "--skip").startswith(f"{target}: 5 sft rows, 1 skipped; the first: {source}:1: ")
    assert len(read_rows([DataSource(files=target.name)], "sft", tmp_path, RowPolicy(), "d")) == 5


def test_prompts_keep_the_answers_before_them(tmp_path):
    rows = [{"messages": turns("user", "assistant", "user")}, {"messages": turns("user")}]
    (tmp_path / "d.jsonl").write_text(jsonl.dumps(rows))
    assert run("messages", tmp_path / "d.jsonl", tmp_path / "o.jsonl") == f"{tmp_path}/o.jsonl: 2 prompt rows\n"
    assert next(jsonl.read(tmp_path / "o.jsonl")) == rows[0]


def test_a_target_that_is_a_folder_is_named(tmp_path):
    (tmp_path / "d.jsonl").write_text(jsonl.dumps([SOURCES["alpaca"][1]]))
    (problem,) = run("alpaca", tmp_path / "d.jsonl", tmp_path)
    assert problem.startswith(f"{tmp_path} is a folder: give the target as a file")

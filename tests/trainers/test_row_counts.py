"""What happened to every row, from a training phase's last words to its result, its card and the report."""

import json

import pytest

from trainers import jsonl

GOOD = {"prompt": "abc", "response": "cba"}
SETTINGS = {"duration": {"maxSteps": 1}, "batchSize": 4}


@pytest.fixture
def sft(tiny_model_dir, tmp_path, run_phase, capfd):
    """Run sft on rows; (exit code, result, what was printed)."""

    def run(lines, **data):
        (tmp_path / "d.jsonl").write_text(
            "".join(line if isinstance(line, str) else jsonl.dump(line) for line in lines)
        )
        train = {"train": [{"files": str(tmp_path / "d.jsonl")}], "maxLength": 8, **data}
        spec = {"model": {"source": str(tiny_model_dir)}, "data": train, **SETTINGS}
        code, result = run_phase("sft", spec, {}, tmp_path / "run" / "sft", run="counted", phase="sft")
        printed = capfd.readouterr()
        return code, result, printed.out + printed.err

    return run


def test_every_row_is_accounted_for(sft, tmp_path, run_phase):
    long = {"prompt": "a b c d e f g h i j", "response": "c"}
    endless = {"prompt": "a", "response": "a b c d e f g h i j"}
    code, result, printed = sft([GOOD, GOOD, "{\n", long, endless, GOOD, GOOD], onMalformed="skip")
    assert code == 0
    (record,) = result.data
    assert (record.rows, record.shortened, record.dropped, record.skipped) == (5, 1, 1, 1)
    line = (
        "data.train[0]: 5 of 7 rows used, 1 dropped (too long), 1 used in part, 1 skipped (malformed); "
        f"the first: {tmp_path}/d.jsonl:3: not valid JSON (Expecting property name enclosed in double quotes at column 2)"
    )
    assert printed.splitlines().count(line) == 1
    written = json.loads((tmp_path / "run" / "sft" / "result.json").read_text())["data"][0]
    assert (written["shortened"], written["dropped"], written["skipped"]) == (1, 1, 1)
    root = tmp_path / "run" / "package"
    assert run_phase("package", {}, {"sft": tmp_path / "run" / "sft"}, root, run="counted")[0] == 0
    assert f"{tmp_path}/d.jsonl | 5 | 1 | 1 | 1 |" in (root / "models" / "sft" / "README.md").read_text()
    assert '<td>5</td><td>1</td><td>1</td><td title="' in (root / "report.html").read_text()


@pytest.mark.parametrize("least", [None, 0.25])
def test_training_on_a_remnant_fails_unless_told_otherwise(sft, least):
    endless = {"prompt": "a", "response": "a b c d e f g h i j"}
    code, result, printed = sft([GOOD, *[endless] * 2], **({} if least is None else {"minRows": least}))
    if least is not None:
        assert (code, result.data[0].dropped) == (0, 2)
        return
    assert code == 2
    assert "BadInput: data.train: only 1 of 3 rows can be used, less than minRows 0.5: data.train[0]: 1 of 3" in printed


def test_a_finished_result_does_not_hide_that_too_few_rows_were_usable(sft):
    lines = [GOOD, {"prompt": "a", "response": "a b c d e f g h i j"}]
    assert sft(lines, minRows=0)[0] == 0
    code, _, printed = sft(lines, minRows=1)
    assert code == 2
    assert "only 1 of 2 rows can be used, less than minRows 1" in printed


def test_training_on_no_scored_token_fails(sft):
    code, _, printed = sft([{"prompt": "a", "response": "a b c d e f g h i j"}] * 2, minRows=0)
    assert code == 2
    assert "BadInput: data.train: no usable rows: data.train[0]: 0 of 2 rows used, 2 dropped (too long)" in printed

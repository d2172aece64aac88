"""JSONL: what is written is read again, whatever Unicode it holds; what is no JSON is named by file and line."""

import gzip
import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainers import json_text, jsonl
from trainers.contract import BadInput
from trainers.meter import Meter
from trainers.phase_dir import PhaseDir
from trainers.spec import Tracking

ENDS_OF_LINES = ["\n", "\r", "\x0b", "\x0c", "\x1c", "\x1d", "\x1e", "\x85", "\u2028", "\u2029"]
"""All that ``str.splitlines`` splits at."""

texts = st.text() | st.sampled_from(ENDS_OF_LINES) | st.text(st.sampled_from(["a", '"', "\\", "\0", *ENDS_OF_LINES]))
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=8,
)
rows = st.lists(st.dictionaries(texts, values, max_size=3), max_size=4)


@given(rows)
def test_what_is_written_is_read_again(tmp_path_factory, written):
    path = tmp_path_factory.mktemp("rows") / "d.jsonl"
    path.write_text(jsonl.dumps(written), newline="")
    assert list(jsonl.read(path)) == written
    assert list(jsonl.read_whole_lines(path)) == written
    assert path.read_bytes().count(b"\n") == len(written)


@given(rows)
def test_what_python_escapes_or_spreads_differently_is_read_the_same(tmp_path_factory, written):
    """ASCII escapes, Windows' line ends, a byte order mark, blank lines, compression: as other programs write."""
    path = tmp_path_factory.mktemp("rows") / "d.jsonl.gz"
    text = "\r\n\r\n".join(json.dumps(row) for row in written)
    path.write_bytes(gzip.compress(b"\xef\xbb\xbf" + text.encode()))
    assert list(jsonl.read(path)) == written


@given(st.text(st.characters(), min_size=1))  # with surrogates
def test_a_row_is_written_whole_or_refused(text):
    try:
        text.encode()
    except UnicodeEncodeError:
        with pytest.raises(ValueError, match="surrogates"):
            jsonl.dump({"a": text})
        with pytest.raises(json_text.Malformed, match="half a character"):
            json_text.parse(json.dumps({"a": text}))
    else:
        assert json_text.parse(jsonl.dump({"a": text})) == {"a": text}


def test_a_pair_of_surrogates_is_one_character():
    assert json_text.parse('{"a": "\\ud83d\\ude00"}') == {"a": "😀"}


NO_JSON = [
    ('{"a": "\\ud800"}', "half a character: \\ud800 alone is no text"),
    ('{"\\udfff": 1}', "half a character: \\udfff alone is no text"),
    ("[" * 1000 + "]" * 1000, "nested deeper than 64 levels"),
    ("[" * 100_000 + "]" * 100_000, "nested deeper than 64 levels"),
    ('{"a":' * 65 + "1" + "}" * 65, "nested deeper than 64 levels"),
    ('{"a": NaN}', "NaN is no JSON; leave the key out or write null"),
    ('{"a": [-Infinity]}', "-Infinity is no JSON; leave the key out or write null"),
    ('{"a": 1e999}', "the number 1e999 is too large"),
    ('{"a": ' + "9" * 5000 + "}", "not valid JSON (Exceeds the limit"),
    ('{"a": "b', "not valid JSON (Unterminated string starting at at column 7)"),
    ('{"a": 1} {"b": 2}', "not valid JSON (Extra data at column 10)"),
    ('{"a": 1}\u2028', "not valid JSON (Extra data at column 9)"),
    ('{"a": "\t"}', "not valid JSON (Invalid control character at at column 8)"),
    (b'{"a": "\xff"}', "not UTF-8 text (invalid start byte at byte 8)"),
    ('{"a": 1}'.encode("utf-16"), "not UTF-8 text"),
]


@pytest.mark.parametrize(("line", "reason"), NO_JSON, ids=range(len(NO_JSON)))
def test_what_is_no_json_is_named_by_file_and_line(tmp_path, line, reason):
    path = tmp_path / "d.jsonl"
    path.write_bytes(b'{"a": 1}\n\n' + (line if isinstance(line, bytes) else line.encode()) + b'\n{"b": 2}\n')
    with pytest.raises(BadInput) as caught:
        list(jsonl.read(path))
    assert str(caught.value).startswith(f"{path}:3: {reason}")
    assert len(str(caught.value).splitlines()) == 1
    assert list(jsonl.read_whole_lines(path)) == [{"a": 1}, {"b": 2}]


def test_nesting_up_to_the_limit_and_many_brackets_are_fine():
    deep = "[" * 64 + "]" * 64
    assert json.dumps(json_text.parse(deep)) == deep
    assert json_text.parse(json.dumps([["{"] * 100] * 100)) == [["{"] * 100] * 100


def _cut(data):
    return data[: len(data) // 2]


def _flip(data):
    return data[: len(data) // 2] + bytes([data[len(data) // 2] ^ 0xFF]) + data[len(data) // 2 + 1 :]


def _wrong_sum(data):
    return data[:-8] + bytes(4) + data[-4:]


@pytest.mark.parametrize("damage", [_cut, _flip, _wrong_sum, lambda data: data + b"junk", lambda _: b'{"a": 1}\n'])
def test_a_damaged_gzip_file_is_named_by_line(tmp_path, damage):
    path = tmp_path / "d.jsonl.gz"
    text = "".join(f'{{"a": {i * 7919 % 1009}}}\n' for i in range(2000))
    path.write_bytes(damage(gzip.compress(text.encode())))
    with pytest.raises(BadInput, match=r"d\.jsonl\.gz:\d+: (cannot be read from here on: damaged gzip file|not )"):
        list(jsonl.read(path))


def test_a_torn_last_line_is_left_out(tmp_path):
    path = tmp_path / "d.jsonl"
    path.write_bytes('{"a": 1}\n{"a": "ä'.encode()[:-1])
    assert list(jsonl.read_whole_lines(path)) == [{"a": 1}]


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_never_written(number):
    with pytest.raises(ValueError, match="not JSON compliant"):
        jsonl.dump({"a": [number]})


def test_metrics_that_are_not_finite_are_gaps_and_a_resumed_phase_reads_them(tmp_path):
    """NaN in metrics.jsonl would make it no JSON; the line still counts its step."""
    labels = {"run": "r", "phase": "p\u2028q", "type": "sft", "rank": "0"}
    for first in (0, 2):
        meter = Meter(PhaseDir(tmp_path), labels, 0, Tracking())
        meter.begin(first, 4)
        for step in range(first, first + 2):
            meter.log(step + 1, loss=math.nan, note=1.0)
        meter.close()
    lines = list(jsonl.read(tmp_path / "metrics.jsonl"))
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert {(line["loss"], line["note"]) for line in lines} == {(None, 1.0)}


@pytest.mark.parametrize("name", ["d.jsonl", "d.jsonl.gz", "d.json"])
@given(data=st.binary(max_size=60) | st.text(st.sampled_from('[]{}":,0eN\\ud8\n '), max_size=40).map(str.encode))
def test_whatever_a_file_holds_it_is_read_or_bad_input(tmp_path_factory, name, data):
    path = tmp_path_factory.mktemp("any") / name
    path.write_bytes(data)
    try:
        for _, found in jsonl.items(path):
            jsonl.dump({"a": json_text.value(found)})
    except (BadInput, json_text.Malformed) as problem:
        assert len(str(problem).splitlines()) == 1  # noqa: PT017 - either outcome is right


@given(st.lists(texts, min_size=1, max_size=3))
def test_a_stopped_rollout_goes_on_behind_any_response(tmp_path_factory, responses):
    from trainers.phases.rollout.parts import Parts

    parts = Parts(tmp_path_factory.mktemp("parts"))
    rows = [{"prompt": "p", "teacher_response": text, "reward": 0.5} for text in responses]
    parts.write(0, len(rows), rows)
    parts.write(len(rows), 2 * len(rows), rows)
    assert parts.done() == 2 * len(rows)
    assert list(parts.rows()) == rows + rows


@pytest.mark.parametrize("name", ["d.jsonl", "d.jsonl.gz"])
def test_a_first_line_that_is_too_long_is_one_line_that_is_too_long(tmp_path, monkeypatch, name):
    """It was cut, and its rest taken for a second line."""
    monkeypatch.setattr(jsonl, "MAX_LINE", 100)
    content = b'\xef\xbb\xbf{"a": "' + b"x" * 500 + b'"}\n{"a": 1}\n'
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    (place, problem), (_, line) = jsonl.lines(tmp_path / name)
    assert (place, line) == (f"{tmp_path / name}:1", b'{"a": 1}\n')
    assert isinstance(problem, json_text.Malformed)

"""Files that are not what their names say: every line of them is read, or named by file and line, in bounded memory."""

import gzip
import json
import os
import socket
import tracemalloc
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from controller.chat_problems import template_problems
from trainers import data_files, json_lists, json_text, jsonl
from trainers.contract import BadInput, Infrastructure
from trainers.core.chat_settings import apply_chat_settings
from trainers.core.lines import indexed
from trainers.core.rows import read_rows
from trainers.fingerprints import source_files
from trainers.spec import ChatSettings, DataSource, RowPolicy

GOOD = b'{"prompt": "q", "response": "a"}'
LONG = b'{"prompt": "' + b"x" * json_text.MAX_LINE + b'", "response": "a"}'
FIRST = "d.jsonl:2: "

BAD_LINES = {
    "bad UTF-8": (b'{"prompt": "\xc3\x28"}', "not UTF-8 text (invalid continuation byte at byte 13)"),
    "UTF-16": (b"\xff\xfe" + GOOD.decode().encode("utf-16-le"), "not UTF-8 text but UTF-16: save the file as UTF-8"),
    "UTF-16 without a mark": (
        GOOD.decode().encode("utf-16-le"),
        "not valid JSON (a NUL byte, as a crash or another encoding leaves them, at column 2)",
    ),
    "NUL in a text": (b'{"prompt": "a\0b"}', "not valid JSON (a NUL byte, as a crash or another encoding leaves them"),
    "NUL alone": (bytes(4096), "not valid JSON (a NUL byte, as a crash or another encoding leaves them, at column 1)"),
    "nested 1,000 deep": (b'{"prompt":' * 1000 + b"1" + b"}" * 1000, "nested deeper than 64 levels"),
    "nested lists": (b'{"prompt": ' + b"[" * 1000 + b"]" * 1000 + b"}", "nested deeper than 64 levels"),
    "lone surrogate": (b'{"prompt": "\\udc00"}', "half a character: \\udc00 alone is no text"),
    "10,000 digits": (b'{"prompt": ' + b"7" * 10_000 + b"}", "not valid JSON (Exceeds the limit (4300 digits)"),
    "too large": (b'{"prompt": 1e400}', "the number 1e400 is too large"),
    "a key twice": (b'{"prompt": "a", "response": "b", "prompt": "c"}', "the key 'prompt' is there twice"),
    "too long": (LONG, "longer than 16,777,216 bytes"),
    "U+2028 between values": (b'{"a": 1}\xe2\x80\xa8{"a": 2}', "not valid JSON (Extra data at column 9)"),
    "carriage returns only": (GOOD + b"\r" + GOOD, "not valid JSON (Extra data at column 34)"),
    "no object": (b'["prompt"]', "expected an object, got list"),
}


def rows_of(path, skip=False, **policy):
    policy = RowPolicy(on_malformed="skip" if skip else "stop", min_rows=policy.get("min_rows", 0))
    return read_rows([DataSource(files=str(path))], "sft", path.parent, policy, "data.train")


@pytest.mark.parametrize("name", ["d.jsonl", "d.jsonl.gz"])
@pytest.mark.parametrize("kind", BAD_LINES)
def test_a_bad_line_is_named_or_skipped_and_counted(tmp_path, kind, name):
    line, reason = BAD_LINES[kind]
    path = tmp_path / name
    content = b"\n".join([GOOD, line, GOOD, b""])
    path.write_bytes(gzip.compress(content, 1) if name.endswith(".gz") else content)
    with pytest.raises(BadInput) as caught:
        rows_of(path)
    assert str(caught.value).startswith(f"{path}:2: {reason}")
    assert len(str(caught.value).splitlines()) == 1
    rows = rows_of(path, skip=True)
    assert (len(rows), rows.records[0].skipped) == (2, 1)
    assert rows.places == [f"{path}:1", f"{path}:3"]
    assert rows.records[0].first_skipped.startswith(f"{path}:2: {reason}")


@pytest.mark.parametrize("bad", [kind for kind in BAD_LINES if kind not in ("carriage returns only",)])
def test_a_bad_item_of_a_list_too(tmp_path, bad):
    """One whose end cannot be told ends the file; after any other the list goes on."""
    line, reason = BAD_LINES[bad]
    path = tmp_path / "d.json"
    path.write_bytes(b"[" + b",\n".join([GOOD, line, GOOD]) + b"]")
    with pytest.raises(BadInput) as caught:
        rows_of(path)
    assert str(caught.value).startswith(str(path))
    assert len(str(caught.value).splitlines()) == 1
    if (
        reason.startswith(("half", "the number", "the key", "expected", "longer", "not valid JSON (Exceeds"))
        or bad == "bad UTF-8"
    ):
        rows = rows_of(path, skip=True)
        assert (len(rows), rows.records[0].skipped) == (2, 1)
        assert f"{path} row 2: " in str(caught.value)
        assert f"{path} row 2: " in rows.records[0].first_skipped
    else:
        with pytest.raises(BadInput):
            rows_of(path, skip=True)


@pytest.mark.parametrize("name", ["d.jsonl", "d.jsonl.gz", "d.json"])
def test_a_line_is_never_in_memory_whole(tmp_path, monkeypatch, name):
    limit = 2**20
    for module in (jsonl, json_lists):
        monkeypatch.setattr(module, "MAX_LINE", limit)
    path = tmp_path / name
    content = (b"[" if name == "d.json" else GOOD + b"\n") + b"\0" * 64 * limit
    path.write_bytes(gzip.compress(content, 1) if name.endswith(".gz") else content)
    del content
    tracemalloc.start()
    try:
        if name == "d.json":
            with pytest.raises(BadInput, match="an item, or what begins like one, is longer than"):
                rows_of(path, skip=True)
        else:
            rows = rows_of(path, skip=True)
            assert (len(rows), rows.records[0].skipped) == (1, 1)
            assert f"{path}:2: longer than" in rows.records[0].first_skipped
        assert tracemalloc.get_traced_memory()[1] < 16 * limit
    finally:
        tracemalloc.stop()


def test_an_unclosed_text_of_a_list_is_given_up_at_the_limit(tmp_path, monkeypatch):
    monkeypatch.setattr(json_lists, "MAX_LINE", 1000)
    monkeypatch.setattr(json_lists, "CHUNK", 100)
    path = tmp_path / "d.json"
    path.write_text('[{"a": 1},\n{"a": "' + "x" * 100_000)
    with pytest.raises(BadInput, match=r"d\.json: line 2: an item, or what begins like one, is longer than"):
        list(jsonl.items(path))


def _broken(content):
    whole = gzip.compress(content, 6)
    middle = len(whole) // 2
    return {
        "cut": whole[:middle],
        "flipped": whole[:middle] + bytes(b ^ 0x55 for b in whole[middle : middle + 20]) + whole[middle + 20 :],
        "wrong sum": whole[:-8] + bytes(4) + whole[-4:],
        "garbage behind": whole + b"garbage",
        "cut in the head": whole[:5],
        "no gzip": content,
        "second member cut": whole + whole[: len(whole) - 9],
    }


TEXTS = [{"prompt": f"{i * 7919 % 10007} {i}", "response": f"{i}"} for i in range(4000)]
CONTENT = jsonl.dumps(TEXTS).encode()


@pytest.mark.parametrize(("damage", "least"), [
    ("cut", 1500), ("flipped", 800), ("wrong sum", 4000), ("garbage behind", 4000), ("cut in the head", 0),
    ("no gzip", 0), ("second member cut", 7000),
])  # fmt: skip
def test_what_a_damaged_gzip_file_holds_before_the_damage_counts(tmp_path, damage, least):
    path = tmp_path / "d.jsonl.gz"
    path.write_bytes(_broken(CONTENT)[damage])
    with pytest.raises(BadInput, match=r"d\.jsonl\.gz:\d+: cannot be read from here on: damaged gzip file|not "):
        rows_of(path)
    if not least:
        with pytest.raises(BadInput, match=r"no usable rows: .* skipped"):
            rows_of(path, skip=True)
        return
    rows = rows_of(path, skip=True)
    assert least <= len(rows)
    told = rows.records[0].first_skipped
    assert "cannot be read from here on" in told
    if damage != "flipped":  # what comes of flipped bits until that is noticed nobody knows
        least = len(rows)
        assert f"{path}:{len(rows) + 1}: " in told
    assert [row["prompt"] for row in rows.rows[:least]] == [(TEXTS * 2)[i]["prompt"] for i in range(least)]


def test_that_a_file_breaks_off_is_told_before_any_bad_row(tmp_path):
    path = tmp_path / "d.jsonl.gz"
    path.write_bytes(_broken(b"{\n" + CONTENT)["cut"])
    record = rows_of(path, skip=True).records[0]
    assert record.skipped == 2
    assert "cannot be read from here on" in record.first_skipped


def test_members_zeros_marks_and_line_ends_of_other_programs_are_fine(tmp_path):
    path = tmp_path / "d.jsonl.gz"
    path.write_bytes(gzip.compress(data_files.BOM + GOOD + b"\r\n\r\n") + gzip.compress(b" \t\n" + GOOD) + bytes(512))
    assert len(rows_of(path)) == 2


def test_what_is_no_file_is_never_opened(tmp_path):
    """A pipe that nobody writes to would be waited for, for ever."""
    os.mkfifo(tmp_path / "pipe.jsonl")
    (tmp_path / "folder.jsonl").mkdir()
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(tmp_path / "socket.jsonl"))
        for name in ("pipe.jsonl", "socket.jsonl"):
            with pytest.raises(BadInput, match=rf"{name} is no regular file, but a pipe, socket or device"):
                source_files(name, tmp_path)
        with pytest.raises(BadInput, match=r"folder\.jsonl is a folder; name its files, for example .*/\*\.jsonl"):
            source_files("folder.jsonl", tmp_path)
        with pytest.raises(BadInput, match="no file matches"):
            source_files("*.jsonl", tmp_path)


@pytest.mark.parametrize("name", ["d.jsonl", "d.json", "d.jsonl.gz"])
def test_an_empty_file_has_no_rows(tmp_path, name):
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(BadInput, match="no usable rows"):
        rows_of(tmp_path / name)


@pytest.mark.parametrize("edit", [
    lambda path: path.open("ab").write(GOOD),
    lambda path: os.truncate(path, 10),
    lambda path: path.with_name("new").rename(path),
    lambda path: path.unlink(),
])  # fmt: skip
def test_a_file_that_changes_while_it_is_read_is_read_again_by_another_attempt(tmp_path, edit):
    path = tmp_path / "d.jsonl"
    for file in (path, path.with_name("new")):
        file.write_bytes(b"\n".join([GOOD] * 50_000))
    found = jsonl.items(path)
    next(found)
    edit(path)
    with pytest.raises(Infrastructure, match=r"d\.jsonl( was edited while|: cannot be read: No such file)"):
        list(found)


def test_a_file_that_is_gone_is_looked_for_again(tmp_path):
    with pytest.raises(Infrastructure, match=r"d\.jsonl: cannot be read: No such file"):
        list(jsonl.items(tmp_path / "d.jsonl"))


texts = st.text(st.sampled_from('a"\\{}[],:\n\u2028é😀 \0'), max_size=8)
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=8,
)


@pytest.fixture(params=[3, 64])
def small_chunks(request, monkeypatch):
    monkeypatch.setattr(json_lists, "CHUNK", request.param)


@given(st.lists(values, max_size=6), st.sampled_from([None, 1]), st.booleans())
@pytest.mark.usefixtures("small_chunks")
def test_a_list_is_read_as_python_reads_it_wherever_the_reading_stops(tmp_path_factory, written, indent, ascii_only):
    path = tmp_path_factory.mktemp("list") / "d.json"
    path.write_text(json.dumps(written, indent=indent, ensure_ascii=ascii_only) + "\n")
    found = list(jsonl.items(path))
    assert [item for _, item in found] == json.loads(path.read_text())
    assert [place for place, _ in found] == [f"{path} row {i}" for i in range(1, len(written) + 1)]


def _no_constant(name):
    raise ValueError(name)


@given(st.text(st.sampled_from('[]{}",:0e1\\ \nxab'), max_size=20).map(lambda text: f"[{text}"))
@pytest.mark.usefixtures("small_chunks")
def test_what_python_refuses_in_a_list_is_refused_too_at_its_line_and_column(tmp_path_factory, text):
    path = tmp_path_factory.mktemp("list") / "d.json"
    path.write_text(text)
    try:
        expected = json.loads(text, parse_constant=_no_constant)
    except json.JSONDecodeError as error:
        with pytest.raises(BadInput) as caught:
            list(jsonl.items(path))
        where = f"line {error.lineno}, column {error.colno})"
        told = str(caught.value).endswith(where) or error.msg.startswith(("Unterminated", "Expecting ',' delimiter"))
        assert told
    except ValueError:
        pass
    else:
        found = [item for _, item in jsonl.items(path)]
        assert len(found) == len(expected)
        good = [pair for pair in zip(found, expected, strict=True) if not isinstance(pair[0], json_text.Malformed)]
        assert all(ours == theirs for ours, theirs in good)


@given(st.text(st.sampled_from('[]{}",:0e1.-\\ \nxabu'), max_size=24) | values.map(json.dumps))
def test_a_line_is_read_as_python_reads_it_or_refused(text):
    """Stricter only where a key is there twice, a number is not finite, or half a character stands alone."""
    try:
        expected = json.loads(text, parse_constant=_no_constant)
    except ValueError:
        with pytest.raises(json_text.Malformed):
            json_text.parse(text)
        return
    try:
        assert json_text.parse(text) == expected
    except json_text.Malformed as problem:
        assert str(problem).startswith(("the key", "the number", "half a character"))  # noqa: PT017


def test_a_template_that_is_no_file_or_endless_is_never_read(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "large").write_bytes(b"")
    os.truncate(tmp_path / "large", 50_000_000)
    for name, words in (("pipe", "is no file with a template"), ("large", "is larger than 1,048,576 bytes")):
        with pytest.raises(BadInput, match=rf"chatTemplate: .*/{name} {words}"):
            apply_chat_settings(SimpleNamespace(), ChatSettings(chat_template=name), tmp_path)
    (problem,) = template_problems("model.chatTemplate", ChatSettings(chat_template="large"), tmp_path)
    assert "is larger than 1,048,576 bytes" in str(problem)


def test_blanks_without_end_are_no_blank_line_to_an_index_either(tmp_path):
    path = tmp_path / "d.jsonl"
    path.write_bytes(GOOD + b"\n" + b" " * (json_text.MAX_LINE + 5) + b"\n" + GOOD + b"\n \n")
    found = indexed(path, tmp_path / "index")
    kinds = [type(line) for _, line in jsonl.lines(path)]
    assert [type(found[i][1]) for i in range(len(found))] == kinds == [bytes, json_text.Malformed, bytes]

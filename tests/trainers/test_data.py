"""Reading rows: every malformed kind with its place, and every kind of source. Encoding: what is kept of long rows."""

import json

import pytest
from datasets import Dataset
from row_files import GOOD, PAIR, TALK, read, write

from trainers.contract import BadInput
from trainers.core.rollouts import Prompt
from trainers.core.rows import encode_rows, read_rows
from trainers.core.scratch import scratch_tokenizer
from trainers.spec import DataSource, RowPolicy, ScratchTokenizer

MALFORMED = [
    ("sft", "{", "not valid JSON (Expecting property name enclosed in double quotes at column 2)"),
    ("sft", "[1]", "expected an object, got list"),
    ("sft", {"prompt": "p"}, "key 'response' is missing; sft rows need prompt, response"),
    ("sft", {"prompt": 3, "response": "r"}, "prompt is int, expected text"),
    ("sft", {"prompt": "p", "response": None}, "response is NoneType, expected text"),
    ("sft", {"messages": []}, "messages must be a non-empty list"),
    ("sft", {"messages": "hi"}, "messages must be a non-empty list"),
    ("sft", {"messages": [{"role": "user"}]}, "messages[0] needs a text content"),
    ("sft", {"messages": ["hi"]}, "messages[0] is str, expected an object with role and content"),
    ("sft", {"messages": [{"content": "x"}]}, "messages[0].role is 'None', expected system, user, assistant or tool"),
    ("sft", {"messages": [*TALK, {"role": "human", "content": "x"}]}, "messages[2].role is 'human', expected system"),
    ("sft", {"messages": [TALK[0], {**TALK[1], "weight": 0.5}]}, "messages[1].weight is '0.5', expected 0 (only read)"),
    ("sft", {"messages": TALK[:1]}, "messages hold no assistant turn to learn from"),
    ("sft", {"messages": [*TALK[1:], *TALK[:1]]}, "messages hold no assistant turn to learn from, behind a user's"),
    ("prompt", {"messages": TALK[1:]}, "messages hold no user turn to respond to"),
    ("prompt", {"text": "p"}, "key 'prompt' is missing"),
    (
        "preference",
        {"prompt": "p", "chosen": "c"},
        "key 'rejected' is missing; preference rows need prompt, chosen, rej",
    ),
    ("preference with margin", PAIR, "key 'margin' is missing"),
    ("preference with margin", PAIR | {"margin": "2"}, "margin is str, expected a number"),
    ("traces", {"prompt": "p", "teacher_response": "t", "reward": "high"}, "reward is str, expected a number"),
    ("traces", {"prompt": "p", "teacher_response": "t", "reward": True}, "reward is bool, expected a number"),
    (
        "traces",
        '{"prompt": "p", "teacher_response": "t", "reward": NaN}',
        "NaN is no JSON; leave the key out or write null",
    ),
]
GOOD_ROWS = {
    "sft": GOOD,
    "prompt": {"prompt": "p"},
    "preference": PAIR,
    "preference with margin": PAIR | {"margin": 1},
    "traces": {"prompt": "p", "teacher_response": "t", "reward": 0.5},
}


@pytest.mark.parametrize(("schema", "bad", "reason"), MALFORMED)
def test_a_malformed_row_is_named_by_file_and_line(tmp_path, schema, bad, reason):
    write(tmp_path / "d.jsonl", [GOOD_ROWS[schema], "", bad, GOOD_ROWS[schema]])
    with pytest.raises(BadInput) as caught:
        read(tmp_path, schema)
    assert str(caught.value).startswith(f"{tmp_path}/d.jsonl:3: {reason}")
    skipping = read(tmp_path, schema, on_malformed="skip")
    assert (len(skipping), skipping.records[0].rows, skipping.records[0].skipped) == (2, 2, 1)


def test_text_that_is_not_utf8_is_named_by_line(tmp_path):
    (tmp_path / "d.jsonl").write_bytes(json.dumps(GOOD).encode() + b"\n" + b'{"prompt": "\xff"}\n')
    with pytest.raises(BadInput, match=r"d\.jsonl:\d+: not UTF-8 text"):
        read(tmp_path)


def test_a_torn_gzip_file_is_named(tmp_path):
    write(tmp_path / "d.jsonl.gz", [GOOD] * 100)
    whole = (tmp_path / "d.jsonl.gz").read_bytes()
    (tmp_path / "d.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(BadInput, match=r"d\.jsonl\.gz:\d+: cannot be read"):
        read(tmp_path, files="d.jsonl.gz")


@pytest.mark.parametrize(
    ("rows", "reason"), [([], "data.train: no usable rows"), (["{"], "data.train: no usable rows")]
)
def test_nothing_left_is_an_error(tmp_path, rows, reason):
    write(tmp_path / "d.jsonl", rows)
    with pytest.raises(BadInput, match=reason):
        read(tmp_path, on_malformed="skip")


def test_a_file_that_is_not_there_is_an_error(tmp_path):
    with pytest.raises(BadInput, match=r"no file matches 'missing\*\.jsonl'"):
        read(tmp_path, files="missing*.jsonl")


def test_shards_are_read_in_order_plain_or_compressed(tmp_path):
    write(tmp_path / "d-2.jsonl", [GOOD | {"prompt": "third"}])
    write(tmp_path / "d-1.jsonl.gz", [GOOD | {"prompt": "first"}, GOOD | {"prompt": "second"}])
    rows = read(tmp_path, files="d-*")
    assert [row["prompt"] for row in rows.rows] == ["first", "second", "third"]


def test_limit_counts_usable_rows_and_reads_no_further(tmp_path):
    write(tmp_path / "d.jsonl", [GOOD, "{", GOOD | {"prompt": "second"}, GOOD, "{"])
    rows = read(tmp_path, on_malformed="skip", limit=2)
    assert [row["prompt"] for row in rows.rows] == ["p", "second"]
    assert rows.records[0].skipped == 1


def test_columns_rename_keys(tmp_path):
    write(tmp_path / "d.jsonl", [{"question": "q", "answer": "a", "id": 7}])
    rows = read(tmp_path, columns={"prompt": "question", "response": "answer"})
    assert rows.rows[0]["prompt"] == "q"
    assert rows.rows[0]["response"] == "a"


def test_columns_may_rename_messages(tmp_path):
    write(tmp_path / "d.jsonl", [{"conversation": TALK}])
    assert read(tmp_path, columns={"messages": "conversation"}).rows[0]["messages"] == TALK


def test_several_sources_keep_their_records(tmp_path):
    write(tmp_path / "a.jsonl", [GOOD, GOOD])
    write(tmp_path / "b.jsonl", [GOOD])
    sources = [DataSource(files="a.jsonl"), DataSource(files="b.jsonl")]
    rows = read_rows(sources, "sft", tmp_path, RowPolicy(), "data.train")
    assert [(record.source, record.rows) for record in rows.records] == [("data.train[0]", 2), ("data.train[1]", 1)]
    assert rows.records[0].fingerprint != rows.records[1].fingerprint


def test_synthetic_rows_come_from_their_generator(tmp_path):
    made = DataSource.model_validate({"synthetic": {"task": "letters", "split": "preferences", "count": 5}})
    assert len(read_rows([made], "preference", tmp_path, RowPolicy(), "d")) == 5
    wrong = DataSource.model_validate({"synthetic": {"task": "letters", "split": "nothing", "count": 5}})
    with pytest.raises(BadInput, match="no split 'nothing'"):
        read_rows([wrong], "preference", tmp_path, RowPolicy(), "d")


@pytest.mark.parametrize("form", ["jsonl", "parquet"])
def test_a_dataset_folder_is_read_by_path_and_split(tmp_path, monkeypatch, form):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "set"
    folder.mkdir()
    rows = Dataset.from_list([PAIR | {"chosen": str(i)} for i in range(6)])
    if form == "parquet":
        rows.to_parquet(folder / "train.parquet")
    else:
        rows.to_json(folder / "train.jsonl")
    found = read(tmp_path, "preference", hub={"name": str(folder), "split": "train[2:5]"})
    assert [row["chosen"] for row in found.rows] == ["2", "3", "4"]
    with pytest.raises(BadInput, match=r"\[train\] row 1: key 'prompt2' is missing|row 1: key 'response' is missing"):
        read(tmp_path, "sft", hub={"name": str(folder)})
    with pytest.raises(BadInput, match="split nothing"):
        read(tmp_path, "preference", hub={"name": str(folder), "split": "nothing"})


def test_tables_are_read_from_their_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    for form in ("parquet", "csv"):
        (tmp_path / form).mkdir()
        getattr(Dataset.from_list([GOOD]), f"to_{form}")(tmp_path / form / f"train.{form}")
        with pytest.raises(
            BadInput, match=f"not JSONL; a folder of .{form} files is read as a data set: hub: {{name: FOLDER}}"
        ):
            read(tmp_path, files=f"{form}/*")
        assert read(tmp_path, hub={"name": str(tmp_path / form)}).rows == [GOOD]


def test_messages_of_a_dataset_have_no_keys_that_are_null(tmp_path, monkeypatch):
    """Columns of a table are the same in all rows: what a message lacks is null there."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    call = {"type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
    rows = [
        {"messages": [*TALK, {"role": "tool", "content": "r", "name": "f"}], "system": None},
        {"messages": [TALK[0], {"role": "assistant", "content": None, "tool_calls": [call]}], "system": "s"},
    ]
    (tmp_path / "set").mkdir()
    Dataset.from_list(rows).to_parquet(tmp_path / "set" / "train.parquet")
    found = read(tmp_path, "sft", hub={"name": str(tmp_path / "set")}).rows
    assert found[0] == {"messages": rows[0]["messages"]}
    called = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
    system, asked, answer = found[1]["messages"]
    assert (system["content"], asked) == ("s", TALK[0])
    assert answer == {"role": "assistant", "content": "", "tool_calls": [called]}


def test_a_dataset_that_is_not_there_is_an_error(tmp_path):
    with pytest.raises(BadInput, match="nowhere split train"):
        read(tmp_path, hub={"name": str(tmp_path / "nowhere")})


# ---------------------------------------------------------------- counting


def encoded(tmp_path, lengths, longest, **policy):
    """Rows of so many words, as prompts that lose what is longer; what is longer than twice that is dropped."""
    write(tmp_path / "d.jsonl", [{"prompt": "a " * n} for n in lengths])
    policy = RowPolicy(**policy)
    rows = read_rows([DataSource(files="d.jsonl")], "prompt", tmp_path, policy, "data.train")

    def encode(row):
        words = row["prompt"].split()
        if len(words) == 13:
            raise BadInput("the chat template refuses it")
        lost = max(len(words) - longest, 0)
        return [Prompt(row, [0] * (len(words) - lost), lost)] if len(words) <= 2 * longest else []

    return rows, encode_rows(rows, encode, policy, "data.train")


def test_every_row_is_counted_once(tmp_path):
    rows, items = encoded(tmp_path, [1, 5, 6, 10, 11, 13], 5, on_malformed="skip")
    (record,) = rows.records
    assert (len(items), record.rows, record.shortened, record.dropped, record.skipped) == (4, 4, 2, 1, 1)
    assert record.read == 6
    assert str(record) == (
        "data.train[0]: 4 of 6 rows used, 1 dropped (too long), 2 used in part, 1 skipped (malformed); "
        f"the first: {tmp_path}/d.jsonl:6: the chat template refuses it"
    )


def test_a_row_that_the_chat_template_refuses_is_named(tmp_path):
    with pytest.raises(BadInput, match=r"d\.jsonl:2: the chat template refuses it$"):
        encoded(tmp_path, [1, 13], 20)


@pytest.mark.parametrize("share", [0.5, 0.25, 0.0, 1.0])
@pytest.mark.parametrize("used", [0, 1, 2, 4])
def test_a_remnant_of_the_rows_is_refused_unless_told_otherwise(tmp_path, share, used):
    lengths = [1] * used + [9] * (4 - used)
    if used and used / 4 >= share:
        assert len(encoded(tmp_path, lengths, 2, min_rows=share)[1]) == used
        return
    with pytest.raises(BadInput) as caught:
        encoded(tmp_path, lengths, 2, min_rows=share)
    reason = f"only {used} of 4 rows can be used, less than minRows {share:g}: " if used else "no usable rows: "
    losses = f"data.train[0]: {used} of 4 rows used, {4 - used} dropped (too long)"
    assert str(caught.value).startswith(f"data.train: {reason}{losses}")


def test_malformed_rows_count_among_those_that_cannot_be_used(tmp_path):
    write(tmp_path / "d.jsonl", [GOOD, "{", "[", GOOD, "{}"])
    with pytest.raises(
        BadInput, match=r"only 2 of 5 rows .* 3 skipped \(malformed\); the first: .*d\.jsonl:2: not valid"
    ):
        read(tmp_path, on_malformed="skip")
    rows = read_rows([DataSource(files="d.jsonl")], "sft", tmp_path, RowPolicy(on_malformed="skip", min_rows=0.4), "d")
    assert len(rows) == 2


def test_the_share_is_that_of_all_sources_together(tmp_path):
    write(tmp_path / "a.jsonl", ["{"])
    write(tmp_path / "b.jsonl", [GOOD, GOOD])
    sources = [DataSource(files="a.jsonl"), DataSource(files="b.jsonl")]
    rows = read_rows(sources, "sft", tmp_path, RowPolicy(on_malformed="skip"), "d")
    assert [record.rows for record in rows.records] == [0, 2]
    assert encode_rows(rows, lambda row: [Prompt(row, [1])], RowPolicy(), "d")[0].row == GOOD


# ---------------------------------------------------------------- a tokenizer's texts


def test_a_tokenizer_knows_the_words_of_rows_of_every_form(tmp_path):
    rows = [
        {"prompt": "plain", "score": 1},
        {"messages": [{"role": "user", "content": "talk"}]},
        {"chosen": [{"role": "user", "content": "better"}], "rejected": [{"role": "user", "content": "worse"}]},
        {"conversations": [{"from": "human", "value": "shared"}]},
        [{"content": "listed"}],
        {"prompt": "beyond"},
    ]
    write(tmp_path / "d.jsonl", rows)
    spec = ScratchTokenizer.model_validate({"kind": "word", "trainOn": [{"files": "d.jsonl", "limit": 5}]})
    words = set(scratch_tokenizer(spec, tmp_path).get_vocab())
    assert {"plain", "talk", "better", "worse", "shared", "listed"} <= words
    assert not {"beyond", "user", "human"} & words

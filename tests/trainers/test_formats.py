"""Rows as the world writes them: each format becomes the project's rows, and is proposed where it was not named."""

import copy
from typing import get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainers.formats import FORMATS, seed_row
from trainers.formats.conversations import SPEAKERS
from trainers.formats.schemas import SCHEMAS
from trainers.json_text import Malformed
from trainers.spec import DataSource

USER = {"role": "user", "content": "q"}
SYSTEM = {"role": "system", "content": "s"}


def says(text):
    return {"role": "assistant", "content": text}


TALK = [SYSTEM, USER, says("a"), {"role": "user", "content": "q2"}]
CALL = {"type": "function", "function": {"name": "add", "arguments": {"x": 1}}}
CALLED = [
    USER,
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "content": "2"},
    says("two"),
]

CASES = [
    # -- alpaca
    ("alpaca", "sft", {"instruction": "do", "input": "", "output": "done"}, {"prompt": "do", "response": "done"}),
    ("alpaca", "sft", {"instruction": "do", "input": None, "output": "d"}, {"prompt": "do", "response": "d"}),
    ("alpaca", "sft", {"instruction": "do", "input": "it", "output": "d"}, {"prompt": "do\n\nit", "response": "d"}),
    ("alpaca", "prompt", {"instruction": "do", "input": "it"}, {"prompt": "do\n\nit"}),
    (
        "alpaca",
        "sft",
        {"instruction": "q2", "output": "b", "system": "s", "history": [["q", "a"]]},
        {"messages": [*TALK, says("b")]},
    ),
    (
        "alpaca",
        "preference",
        {"instruction": "do", "input": "it", "chosen": "c", "rejected": "r"},
        {"prompt": "do\n\nit", "chosen": "c", "rejected": "r"},
    ),
    # -- sharegpt
    (
        "sharegpt",
        "sft",
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}], "id": "7"},
        {"messages": [USER, says("a")], "id": "7"},
    ),
    (
        "sharegpt",
        "prompt",
        {"system": "s", "conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
        {"messages": [SYSTEM, USER]},
    ),
    (
        "sharegpt",
        "sft",
        {"conversations": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]},
        {"messages": [USER, says("a")]},
    ),
    (
        "sharegpt",
        "sft",
        {
            "conversations": [
                {"from": "human", "value": "q"},
                {"from": "function_call", "value": '{"name": "add", "arguments": {"x": 1}}'},
                {"from": "observation", "value": "2"},
                {"from": "gpt", "value": "two"},
            ],
        },
        {"messages": CALLED},
    ),
    (
        "sharegpt",
        "preference",
        {
            "conversations": [{"from": "human", "value": "q"}],
            "chosen": {"from": "gpt", "value": "c"},
            "rejected": {"from": "gpt", "value": "r"},
        },
        {"messages": [USER], "chosen": "c", "rejected": "r"},
    ),
    # -- messages, named or not
    ("messages", "sft", {"messages": [USER, says("a")]}, {"messages": [USER, says("a")]}),
    (None, "sft", {"messages": [USER, says("a")], "system": "s"}, {"messages": [SYSTEM, USER, says("a")]}),
    (None, "sft", {"messages": [*TALK, says("b")], "system": TALK[0]["content"]}, {"messages": [*TALK, says("b")]}),
    (None, "sft", {"messages": [{"role": "developer", "content": "s"}, USER, says("a")]}, None),
    (None, "sft", {"prompt": "q", "response": "a", "system": "s"}, {"messages": [SYSTEM, USER, says("a")]}),
    (None, "sft", {"prompt": "q", "response": "a", "system": "", "tools": None}, {"prompt": "q", "response": "a"}),
    (None, "sft", {"prompt": TALK, "response": "b"}, {"messages": [*TALK, says("b")]}),
    (None, "prompt", {"prompt": TALK}, {"messages": TALK}),
    (None, "prompt", {"prompt": [USER], "answer": "7"}, {"prompt": "q", "answer": "7"}),
    (None, "prompt", {"messages": CALLED}, {"messages": CALLED[:3]}),
    (
        None,
        "sft",
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "q"}], "name": None}, says("a")]},
        {"messages": [USER, says("a")]},
    ),
    (
        None,
        "sft",
        {
            "messages": [
                USER,
                {
                    "role": "assistant",
                    "content": None,
                    "tool_calls": [{"type": "function", "function": {"name": "add", "arguments": '{"x": 1}'}}],
                },
                *CALLED[2:],
            ]
        },
        {"messages": CALLED},
    ),
    # -- preferences: the prompt in both conversations (TRL), beside them, or both (UltraFeedback)
    (
        "preference-messages",
        "preference",
        {"chosen": [USER, says("c")], "rejected": [USER, says("r")]},
        {"prompt": "q", "chosen": "c", "rejected": "r"},
    ),
    (
        None,
        "preference",
        {"chosen": [*TALK, says("c")], "rejected": [*TALK, says("r")], "score": 1},
        {"messages": TALK, "chosen": "c", "rejected": "r", "score": 1},
    ),
    (
        None,
        "preference",
        {"prompt": TALK, "chosen": [says("c")], "rejected": [says("r")]},
        {"messages": TALK, "chosen": "c", "rejected": "r"},
    ),
    (
        None,
        "preference",
        {"prompt": "q", "chosen": [says("c")], "rejected": [says("r")]},
        {"prompt": "q", "chosen": "c", "rejected": "r"},
    ),
    (
        None,
        "preference",
        {"prompt": "q", "chosen": [USER, says("c")], "rejected": [USER, says("r")], "messages": [USER, says("c")]},
        {"prompt": "q", "chosen": "c", "rejected": "r"},
    ),
    (
        None,
        "preference",
        {"prompt": " q\n", "chosen": [SYSTEM, USER, says("c")], "rejected": [SYSTEM, USER, says("r")]},
        {"messages": [SYSTEM, USER], "chosen": "c", "rejected": "r"},
    ),
    (
        None,
        "preference",
        {"prompt": "q", "system": "s", "chosen": "c", "rejected": "r"},
        {"messages": [SYSTEM, USER], "chosen": "c", "rejected": "r"},
    ),
    (
        None,
        "preference",
        {"prompt": TALK, "chosen": "c", "rejected": "r"},
        {"messages": TALK, "chosen": "c", "rejected": "r"},
    ),
    (
        None,
        "preference",
        {"messages": TALK, "chosen": "c", "rejected": "r"},
        {"messages": TALK, "chosen": "c", "rejected": "r"},
    ),
    (
        None,
        "preference with margin",
        {"chosen": [USER, says("c")], "rejected": [USER, says("r")], "margin": 2},
        {"prompt": "q", "chosen": "c", "rejected": "r", "margin": 2},
    ),
    (
        None,
        "preference",
        {"chosen": [USER, says("c") | {"reasoning_content": "t"}], "rejected": [USER, says("c")]},
        {"prompt": "q", "chosen": says("c") | {"reasoning_content": "t"}, "rejected": "c"},
    ),
    (
        None,
        "preference",
        {"prompt": "q", "chosen": says("c"), "rejected": "r"},
        {"prompt": "q", "chosen": "c", "rejected": "r"},
    ),
    # -- transcripts
    (
        "hh",
        "preference",
        {
            "chosen": "\n\nHuman: q\n\nAssistant: a\n\nHuman: q2: why?\n\nOr: not\n\nAssistant: c",
            "rejected": "\n\nHuman: q\n\nAssistant: a\n\nHuman: q2: why?\n\nOr: not\n\nAssistant:  r ",
        },
        {
            "messages": [USER, says("a"), {"role": "user", "content": "q2: why?\n\nOr: not"}],
            "chosen": "c",
            "rejected": "r",
        },
    ),
    (
        "hh",
        "sft",
        {"transcript": "Human: q\n\nHuman: more\n\nAssistant: a"},
        {"messages": [{"role": "user", "content": "q\n\nmore"}, says("a")]},
    ),
    # -- prompt and completion
    ("prompt-completion", "sft", {"prompt": "q", "completion": "a"}, {"prompt": "q", "response": "a"}),
    ("prompt-completion", "sft", {"prompt": TALK, "completion": [says("b")]}, {"messages": [*TALK, says("b")]}),
    ("prompt-completion", "sft", {"prompt": "q", "completion": [says("a")]}, {"messages": [USER, says("a")]}),
    # -- traces of a conversation
    (
        None,
        "traces",
        {"prompt": "q2", "messages": TALK, "teacher_response": "b", "reward": 1.5, "ended": False},
        {"prompt": "q2", "messages": TALK, "teacher_response": "b", "reward": 1.5, "ended": False},
    ),
]


@pytest.mark.parametrize(("name", "schema", "raw", "wanted"), CASES, ids=range(len(CASES)))
def test_a_row_of_a_format_becomes_one_of_ours(name, schema, raw, wanted):
    before = repr(raw)
    found = seed_row(raw, schema, name, {})
    assert found == (wanted or {"messages": [SYSTEM, USER, says("a")]})
    assert repr(raw) == before  # rows are not changed in place
    assert seed_row(found, schema, None, {}) == found  # what the importer writes is read without a format


NAMED = [case for case in CASES if case[0] not in (None, "messages", "preference-messages")]


@pytest.mark.parametrize(("name", "schema", "raw", "wanted"), NAMED, ids=range(len(NAMED)))
def test_a_format_that_was_not_named_is_proposed(name, schema, raw, wanted):
    with pytest.raises(Malformed, match=f"; its keys are those of `format: {name}`$"):
        seed_row(raw, schema, None, {})


def test_a_wrong_format_is_named_with_the_right_one():
    row = {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}
    with pytest.raises(Malformed, match=r"^alpaca rows need an instruction.*`format: sharegpt`$"):
        seed_row(row, "sft", "alpaca", {})
    with pytest.raises(Malformed, match=r"its keys are right without `format: alpaca`$"):
        seed_row({"prompt": "q", "response": "a"}, "sft", "alpaca", {})


def test_columns_rename_what_a_format_reads():
    row = {"question": "q", "context": "it", "reply": "a"}
    names = {"instruction": "question", "input": "context", "output": "reply"}
    assert seed_row(row, "sft", "alpaca", names)["prompt"] == "q\n\nit"
    with pytest.raises(Malformed, match=r"key 'prompt' is missing.*this one has 'question', 'context', 'reply'"):
        seed_row(row, "sft", None, {})


@pytest.mark.parametrize(
    "columns", [{"response": "respons_b"}, {"foo": "respons_b"}, {"prompt": "prompt", "x": "respons_b"}]
)
def test_a_column_that_a_row_lacks_is_named_and_not_replaced_by_another(columns):
    row = {"prompt": "q", "response": "a"}
    with pytest.raises(
        Malformed, match=r"^column 'respons_b', wanted as .* is missing; this one has 'prompt', 'response'$"
    ):
        seed_row(row, "sft", None, columns)
    given = seed_row(row | {"setting": None}, "sft", None, {"system": "setting"})
    assert (given["prompt"], given["response"]) == ("q", "a")
    assert "system" not in given


PAIR = {"chosen": [USER, says("c")], "rejected": [USER, says("r")]}
ASKED = {"from": "human", "value": "q"}
SHARED_CALL = {"from": "function_call", "value": '{"name": "f", "arguments": {}}'}
SHARED = {"conversations": [ASKED], "chosen": {"from": "gpt", "value": "c"}, "rejected": "r"}
REFUSED = [
    (None, "sft", 3, "expected an object, got int"),
    (None, "sft", {}, "key 'prompt' is missing; sft rows need prompt, response"),
    (None, "sft", {"messages": [USER, {"role": "tool", "content": None}]}, "messages[1] needs a text content"),
    (None, "sft", {"messages": [{"role": ["user"], "content": "q"}]}, "messages[0].role is"),
    (
        None,
        "sft",
        {"messages": [{"role": "user", "content": [{"type": "image"}]}]},
        "messages[0].content[0] is 'image': only text can be used",
    ),
    (
        None,
        "sft",
        {"messages": [USER, {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}]},
        "messages[1].tool_calls[0].function.arguments: not valid JSON",
    ),
    (None, "sft", {"messages": [USER, {"role": "assistant", "tool_calls": 3}]}, "messages[1].tool_calls is int"),
    (None, "sft", {"messages": [USER, {"role": "assistant", "tool_calls": [{}]}]}, "messages[1].tool_calls[0] needs a"),
    (None, "sft", {"prompt": "q", "response": 3, "system": "s"}, "response is int, expected text"),
    (None, "sft", {"prompt": "q", "response": "a", "system": 3}, "system is int, expected text"),
    (None, "sft", {"messages": [SYSTEM, USER, says("a")], "system": "t"}, "system is not what messages begin with"),
    (None, "prompt", {"prompt": [SYSTEM, USER], "system": "t"}, "system is not what messages begin with as a system"),
    (None, "sft", {"messages": [USER, says("a")], "tools": "{"}, "tools: not valid JSON"),
    (None, "sft", {"messages": [USER, says("a")], "tools": '[{"a": "\\ud800"}]'}, "tools: half a character"),
    (None, "sft", {"messages": [USER, says("a")], "tools": "[" * 2000}, "tools: nested deeper than 64 levels"),
    (None, "sft", {"a\u2028b": 1}, "key 'prompt' is missing; sft rows need prompt, response; this one has 'a\\u2028b'"),
    (None, "preference", PAIR | {"chosen": "c"}, "only rejected is a list of messages"),
    (None, "preference", PAIR | {"rejected": []}, "rejected must be a non-empty list"),
    (None, "preference", PAIR | {"chosen": [USER]}, "chosen must be a conversation that ends with an assistant's"),
    (None, "preference", PAIR | {"chosen": [says("c")]}, "chosen must be a conversation that ends with an assistant's"),
    (None, "preference", PAIR | {"chosen": [SYSTEM, USER, says("c")]}, "chosen and rejected differ before their last"),
    (None, "preference", PAIR | {"prompt": "other"}, "chosen begins with a user turn and does not hold the prompt"),
    (
        None,
        "preference",
        PAIR | {"prompt": "q", "chosen": [says("c"), USER, says("d")]},
        "chosen has 3 turns after the prompt, expected one answer",
    ),
    (None, "preference", PAIR | {"chosen": CALLED[:2]}, "chosen ends with a call of a tool"),
    (
        None,
        "preference",
        {"messages": [USER, says("a")], "chosen": "c", "rejected": "r"},
        "messages end with the assis",
    ),
    (None, "preference", {"prompt": "q", "chosen": "c", "rejected": "c"}, "chosen and rejected are the same"),
    (None, "preference", PAIR | {"chosen": PAIR["rejected"]}, "chosen and rejected are the same"),
    (None, "preference", {"prompt": "q", "chosen": USER, "rejected": "c"}, "chosen must be a text, or an assistant's"),
    (None, "preference", {"prompt": "q", "chosen": {}, "rejected": "c"}, "chosen[0].role is 'None'"),
    (None, "prompt", {"prompt": [SYSTEM]}, "messages hold no user turn to respond to"),
    (None, "traces", {"prompt": "p", "teacher_response": "t", "reward": 1, "ended": "no"}, "ended is str, expected tr"),
    ("alpaca", "sft", {"instruction": "do", "output": "x", "history": [["q"]]}, "history[0] is not a pair"),
    ("alpaca", "sft", {"instruction": "do"}, "key 'response' is missing"),
    ("sharegpt", "sft", {"conversations": []}, "messages must be a non-empty list"),
    ("sharegpt", "sft", {"conversations": [{"from": "me", "value": "q"}]}, "conversations[0].from is 'me', expected"),
    ("sharegpt", "sft", {"conversations": [{"from": "gpt"}]}, "conversations[0] needs a text value"),
    (
        "sharegpt",
        "sft",
        {"conversations": [{"from": "function_call", "value": "{"}]},
        "conversations[0]: not valid JSON",
    ),
    ("sharegpt", "preference", SHARED | {"chosen": SHARED_CALL}, "chosen is a call of a tool"),
    ("sharegpt", "preference", SHARED | {"rejected": ASKED}, "rejected is a turn of the user's, expected the assist"),
    ("sharegpt", "preference", SHARED | {"chosen": 3}, "chosen.from is 'None', expected one of"),
    (None, "preference", SHARED | {"chosen": SHARED_CALL}, "chosen[0].role is 'None'"),
    (
        None,
        "traces",
        {"prompt": "p", "teacher_response": "t", "reward": 10**400},
        "reward is too large, expected a fin",
    ),
    (None, "preference with margin", PAIR | {"margin": -(10**5000)}, "margin is too large, expected a finite number"),
    (None, "traces", {"prompt": "p", "teacher_response": "t", "reward": float("nan")}, "reward is nan, expected a fin"),
    ("hh", "preference", {"chosen": "q", "rejected": "\n\nHuman: q\n\nAssistant: r"}, "chosen must be a text that be"),
    ("hh", "preference", {"chosen": "\n\nHuman: q\n\nAssistant: r"}, "rejected must be a text that begins"),
    ("messages", "sft", {"prompt": 3}, "messages rows need messages, a list"),
    ("preference-messages", "preference", {"chosen": "c", "rejected": "r"}, "preference-messages rows need chosen, a"),
    ("prompt-completion", "sft", {"prompt": "q"}, "prompt-completion rows need prompt and completion"),
]


@pytest.mark.parametrize(("name", "schema", "raw", "reason"), REFUSED, ids=range(len(REFUSED)))
def test_what_is_none_of_a_format_is_refused_in_one_line(name, schema, raw, reason):
    with pytest.raises(Malformed) as caught:
        seed_row(raw, schema, name, {})
    assert str(caught.value).startswith(reason)
    assert len(str(caught.value).splitlines()) == 1


def test_sources_name_exactly_the_formats_there_are():
    names, none = get_args(DataSource.model_fields["format"].annotation)
    assert set(get_args(names)) == set(FORMATS)
    assert none is type(None)


WORDS = ["", "q", "user", "assistant", "tool", "human", "function_call", "[]", "{", "\n\nHuman: q"]
atoms = st.none() | st.booleans() | st.sampled_from([1, 0.5]) | st.sampled_from(WORDS)
anything = (
    atoms | st.lists(atoms, max_size=2) | st.dictionaries(st.sampled_from(["role", "content"]), atoms, max_size=2)
)


@st.composite
def damaged(draw):
    """A good row with something else at some place in it, or nothing."""
    row = copy.deepcopy(draw(st.sampled_from(CASES))[2])
    parent, key = row, draw(st.sampled_from(list(row)))
    while draw(st.booleans()) and isinstance(parent[key], dict | list) and parent[key]:
        parent = parent[key]
        key = draw(st.sampled_from(list(parent) if isinstance(parent, dict) else range(len(parent))))
    if draw(st.booleans()):
        del parent[key]
    else:
        parent[key] = draw(anything)
    return row


@settings(max_examples=600)
@given(damaged(), st.sampled_from(sorted(SCHEMAS)), st.sampled_from([None, *FORMATS]))
def test_whatever_a_row_holds_it_is_ours_or_malformed(raw, schema, name):
    try:
        found = seed_row(raw, schema, name, {})
    except Malformed:
        return
    assert "prompt" in found or "messages" in found
    assert all(isinstance(m["content"], str) for m in found.get("messages", []))
    assert seed_row(found, schema, None, {}) == found


values = atoms | st.sampled_from(['{"name": "f", "arguments": {}}', '{"name": "f"}', "[{}]"])
spoken = st.fixed_dictionaries(
    {},
    optional={
        "from": st.sampled_from([*SPEAKERS, "me", None]),
        "role": st.sampled_from(["user", "assistant", "tool"]),
        "value": values,
        "content": values,
        "tool_calls": values | st.lists(values, max_size=1),
    },
)
said = values | spoken | st.lists(spoken, max_size=3)
KEYS = ["conversations", "messages", "prompt", "completion", "response", "chosen", "rejected", "system", "tools"]
MORE = ["instruction", "input", "output", "history", "transcript", "margin", "reward", "teacher_response", "ended"]


@settings(max_examples=300)
@given(
    st.dictionaries(st.sampled_from([*KEYS, *MORE]), said, max_size=5),
    st.sampled_from(sorted(SCHEMAS)),
    st.sampled_from([None, *FORMATS]),
)
def test_a_row_of_whatever_turns_is_ours_or_malformed(raw, schema, name):
    try:
        found = seed_row(raw, schema, name, {})
    except Malformed:
        return
    assert seed_row(found, schema, None, {}) == found

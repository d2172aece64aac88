"""Rows to sequences: what is learned, what is cut, and what both sides of a pair share."""

import numpy as np
import pytest
from row_files import GOOD, PAIR, TALK, read, write

from trainers.contract import BadInput
from trainers.core.chat import chat_format
from trainers.core.encode import joined, preference_pairs, prompt_ids, prompt_messages, sft_sequences
from trainers.core.rows import encode_rows
from trainers.core.scratch import scratch_tokenizer
from trainers.spec import RowPolicy, ScratchTokenizer


@pytest.fixture(scope="module")
def chat(tmp_path_factory):
    folder = tmp_path_factory.mktemp("words")
    write(folder / "d.jsonl", [{"text": "a b c d e f g h q r"}])
    spec = ScratchTokenizer.model_validate({"kind": "word", "trainOn": [{"files": "d.jsonl"}]})
    return chat_format(scratch_tokenizer(spec, folder))


def sft_sequence(chat, row, max_length, everything):
    found = sft_sequences(chat, row, max_length, everything)
    return found[0] if found else None


def shown(chat, sequence) -> tuple[str, str]:
    """(text that is only read, text that is learned)."""
    pieces = [sequence.ids[~sequence.scored], sequence.ids[sequence.scored]]
    return tuple(chat.tokenizer.decode(ids, skip_special_tokens=False) for ids in pieces)


def test_only_the_response_and_its_end_are_learned(chat):
    sequence = sft_sequence(chat, {"prompt": "a b", "response": "c d"}, 64, everything=False)
    assert shown(chat, sequence) == ("<user> a b <assistant>", "c d <eos>")
    everything = sft_sequence(chat, {"prompt": "a b", "response": "c d"}, 64, everything=True)
    assert everything.scored.all()
    np.testing.assert_array_equal(everything.ids, sequence.ids)


def test_a_long_prompt_loses_its_left_end_and_a_long_response_its_row(chat):
    row = {"prompt": "a b c d", "response": "e f"}
    assert shown(chat, sft_sequence(chat, row, 6, everything=False)) == ("c d <assistant>", "e f <eos>")
    assert shown(chat, sft_sequence(chat, row, 4, everything=False)) == ("<assistant>", "e f <eos>")
    assert sft_sequence(chat, row, 3, everything=False) is None


TURNS = [*TALK, {"role": "user", "content": "b"}, {"role": "assistant", "content": "c"}]


def test_a_conversation_learns_all_assistant_turns(chat):
    whole = sft_sequence(chat, {"messages": TURNS}, 64, everything=False)
    assert shown(chat, whole) == ("<user> q <assistant> <user> b <assistant>", "a <eos> c <eos>")
    assert whole.shortened == 0


def test_a_turn_of_weight_0_is_read_and_not_learned(tmp_path, chat):
    """OpenAI's fine-tuning files mark assistant turns so."""
    for weights, learned in (
        ((0, 1), "c <eos>"),
        ((1, 0), "a <eos>"),
        ((0.0, None), "c <eos>"),
        ((1, 1), "a <eos> c <eos>"),
    ):
        turns = [TURNS[0], TURNS[1] | {"weight": weights[0]}, TURNS[2], TURNS[3] | {"weight": weights[1]}]
        write(tmp_path / "d.jsonl", [{"messages": turns}])
        (row,) = read(tmp_path).rows
        sequence = sft_sequence(chat, row, 64, everything=False)
        assert shown(chat, sequence)[1] == learned
        whole = sft_sequence(chat, {"messages": TURNS}, 64, everything=False)
        assert sequence.ids.tolist() == whole.ids[: len(sequence)].tolist()
        if 0 in weights:
            with pytest.raises(BadInput, match="weight 0 is not to be learned"):
                sft_sequences(chat, row, 64, everything=True)
    unlearned = [TURNS[0], TURNS[1] | {"weight": 0}]
    assert sft_sequences(chat, {"messages": unlearned}, 64, everything=False) == []


def test_too_long_a_conversation_learns_every_answer_behind_what_of_its_prompt_has_room(chat):
    first, second = sft_sequences(chat, {"messages": TURNS}, 5, everything=False)
    assert shown(chat, first) == ("<user> q <assistant>", "a <eos>")
    assert shown(chat, second) == ("<user> b <assistant>", "c <eos>")
    assert (first.shortened, second.shortened) == (0, 5)


def test_an_answer_that_is_too_long_is_left_out_and_counted_whichever_form_the_row_has(chat):
    long = "a b c d e f g h"
    turns = [TURNS[0], {"role": "assistant", "content": long}, *TURNS[2:]]
    (sequence,) = sft_sequences(chat, {"messages": turns}, 8, everything=False)
    assert shown(chat, sequence)[1] == "c <eos>"
    assert sequence.shortened == len(chat.turns(turns)[1][0]) - 6 + 9
    assert sft_sequences(chat, {"messages": turns[:2]}, 8, everything=False) == []
    assert sft_sequences(chat, {"prompt": "q", "response": long}, 8, everything=False) == []


def test_messages_and_prompt_with_response_are_the_same_sequence(chat):
    for limit in (3, 4, 64):
        one = sft_sequence(chat, {"messages": TURNS[:2]}, limit, everything=False)
        other = sft_sequence(chat, {"prompt": "q", "response": "a"}, limit, everything=False)
        assert one.ids.tolist() == other.ids.tolist()
        assert one.scored.tolist() == other.scored.tolist()
        assert one.shortened == other.shortened == max(0, 5 - limit)


def test_the_tools_of_a_row_are_part_of_its_prompt(tmp_path):
    tools = [{"type": "function", "function": {"name": "add", "parameters": {}}}]
    row = {"prompt": "q", "tools": tools, "response": "a"}
    assert prompt_messages(row) == [{"role": "tools", "tools": tools}, {"role": "user", "content": "q"}]
    assert prompt_messages({"messages": TURNS, "tools": tools})[1:] == TURNS
    assert prompt_messages({"messages": TURNS, "tools": []}) == TURNS


def test_training_and_generation_start_from_the_same_tokens(chat):
    row = {"prompt": "a b", "response": "c"}
    prompt = prompt_ids(chat, row)
    sequence = sft_sequence(chat, row, 64, everything=False)
    assert sequence.ids[: len(prompt)].tolist() == prompt
    assert prompt_ids(chat, {"messages": [{"role": "user", "content": "a b"}]}) == prompt


def test_both_sides_of_a_pair_share_their_prompt(chat):
    (pair,) = preference_pairs(chat, {"prompt": "a b", "chosen": "c", "rejected": "d e"}, 64)
    assert shown(chat, pair.chosen) == ("<user> a b <assistant>", "c <eos>")
    assert shown(chat, pair.rejected) == ("<user> a b <assistant>", "d e <eos>")
    assert [len(sequence) for sequence in pair.sequences] == [6, 7]
    assert preference_pairs(chat, {"prompt": "a", "chosen": "b", "rejected": "c d e f g h"}, 6) == []


def test_a_row_that_says_the_end_token_in_what_is_learned_is_refused_or_counted(tmp_path, chat):
    answers = [
        {"prompt": "a", "response": "b <eos> c"},
        {"messages": [*TALK, TALK[0], {**TALK[1], "content": "<eos> a"}]},
    ]
    pairs = [PAIR | {"chosen": "a <eos> b"}, PAIR | {"rejected": "a <eos> b"}]
    for rows, schema in ((answers, "sft"), (pairs, "preference")):
        good = GOOD if schema == "sft" else PAIR
        write(tmp_path / "d.jsonl", [good, *rows, good])

        def encode(row, schema=schema):
            return sft_sequences(chat, row, 64, False) if schema == "sft" else preference_pairs(chat, row, 64)

        with pytest.raises(BadInput, match=r"d\.jsonl:2: a response holds the text of the end token '<eos>'"):
            encode_rows(read(tmp_path, schema), encode, RowPolicy(), "data.train")
        found = read(tmp_path, schema)
        assert len(encode_rows(found, encode, RowPolicy(on_malformed="skip"), "data.train")) == 2
        assert (found.records[0].rows, found.records[0].skipped) == (2, 2)


@pytest.mark.parametrize("limit", [5, 6, 7, 8])
def test_a_prompt_that_is_cut_is_cut_alike_for_both_sides_of_a_pair(chat, limit):
    for sides in ({"chosen": "e", "rejected": "f g h"}, {"chosen": "f g h", "rejected": "e"}):
        (pair,) = preference_pairs(chat, {"prompt": "a b c d", **sides}, limit)
        assert shown(chat, pair.chosen)[0] == shown(chat, pair.rejected)[0]
        assert max(len(sequence) for sequence in pair.sequences) == min(limit, 10)
        assert pair.shortened == pair.chosen.shortened == pair.rejected.shortened == 10 - limit


def test_joined_keeps_every_response_token():
    assert joined([1, 2, 3], [4, 5], 4).ids.tolist() == [2, 3, 4, 5]
    assert joined([1, 2, 3], [4, 5], 4).scored.tolist() == [False, False, True, True]
    assert joined([1, 2, 3], [4, 5], 2) is None


def test_dropped_rows_are_counted(tmp_path, chat):
    write(tmp_path / "d.jsonl", [GOOD, {"prompt": "a", "response": "a b c d e f g h"}, GOOD])
    rows = read(tmp_path)
    items = encode_rows(rows, lambda row: sft_sequences(chat, row, 8, everything=False), RowPolicy(), "data.train")
    assert len(items) == 2
    assert (rows.records[0].rows, rows.records[0].dropped) == (2, 1)
    with pytest.raises(BadInput, match=r"no usable rows: data.train\[0\]: 0 of 3 rows used, 3 dropped \(too long\)$"):
        encode_rows(read(tmp_path), lambda row: [], RowPolicy(), "data.train")


def test_a_conversation_asks_what_its_last_user_turn_asks(tmp_path):
    write(tmp_path / "d.jsonl", [{"messages": TALK}, {"messages": TALK[:1]}, {"messages": TALK + TALK}])
    rows = read(tmp_path, schema="prompt").rows
    assert [row["messages"] for row in rows] == [TALK[:1], TALK[:1], TALK + TALK[:1]]

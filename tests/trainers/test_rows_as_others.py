"""Rows read as TRL and transformers read them: the same prompt, the same answers, the same tokens."""

import copy

import pytest
import real_tokenizers
from hypothesis import given
from hypothesis import strategies as st

from trainers.contract import BadInput
from trainers.core.chat import chat_format
from trainers.core.encode import preference_pairs, prompt_ids, sft_sequences
from trainers.formats import seed_row

texts = st.text(st.characters(codec="utf-8"), min_size=1, max_size=8)


@st.composite
def conversations(draw):
    """Turns up to a user's, perhaps behind a system text, and two different answers."""
    turns = [{"role": "system", "content": draw(texts)}] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(0, 2))):
        turns += [{"role": "user", "content": draw(texts)}, {"role": "assistant", "content": draw(texts)}]
    answers = draw(st.lists(texts, min_size=2, max_size=2, unique=True))
    return [*turns, {"role": "user", "content": draw(texts)}], *[{"role": "assistant", "content": a} for a in answers]


def asked(row):
    return row.get("messages") or [{"role": "user", "content": row["prompt"]}]


@given(conversations())
def test_preferences_are_taken_apart_as_trl_does(talk):
    from trl.data_utils import extract_prompt

    turns, chosen, rejected = talk
    row = {"chosen": [*turns, chosen], "rejected": [*turns, rejected]}
    theirs = extract_prompt(copy.deepcopy(row))
    ours = seed_row(row, "preference", None, {})
    assert asked(ours) == theirs["prompt"] == turns
    assert ours["chosen"] == theirs["chosen"][0]["content"]
    assert ours["rejected"] == theirs["rejected"][0]["content"]
    beside = {"prompt": turns, "chosen": [chosen], "rejected": [rejected]}
    assert seed_row(beside, "preference", None, {}) == ours
    assert seed_row(row | {"prompt": turns[-1]["content"]}, "preference", None, {}) == ours


@given(conversations())
def test_shared_conversations_become_the_messages_that_trl_makes(talk):
    from trl.data_utils import maybe_convert_to_chatml

    turns, answer, _ = talk
    shared = [{"from": turn["role"], "value": turn["content"]} for turn in [*turns, answer]]
    theirs = maybe_convert_to_chatml({"conversations": copy.deepcopy(shared)})
    assert seed_row({"conversations": shared}, "sft", "sharegpt", {}) == theirs


TALK = [
    {"role": "user", "content": "What is 2+2?"},
    {"role": "assistant", "content": "Four."},
    {"role": "user", "content": "And twice that?\n\nIn words."},
]
SYSTEM = {"role": "system", "content": "Be brief."}


@pytest.mark.parametrize("family", real_tokenizers.FAMILIES)
def test_every_form_of_a_row_becomes_the_same_tokens(family):
    tokenizer = real_tokenizers.tokenizer(family)
    chat = chat_format(tokenizer)
    turns = [SYSTEM, *TALK]
    yes, no = ({"role": "assistant", "content": text} for text in ("Eight.", "Nine."))
    forms = [
        seed_row(row, "preference", name, {})
        for name, row in [
            (None, {"chosen": [*turns, yes], "rejected": [*turns, no]}),
            (None, {"prompt": turns, "chosen": "Eight.", "rejected": "Nine."}),
            (None, {"prompt": TALK, "system": "Be brief.", "chosen": [yes], "rejected": [no]}),
            (
                "sharegpt",
                {
                    "system": "Be brief.",
                    "conversations": [
                        {"from": {"user": "human", "assistant": "gpt"}[t["role"]], "value": t["content"]} for t in TALK
                    ],
                    "chosen": {"from": "gpt", "value": "Eight."},
                    "rejected": {"from": "gpt", "value": "Nine."},
                },
            ),
        ]
    ]
    wanted = prompt_ids(chat, {"messages": turns})
    if "strftime_now" not in tokenizer.chat_template:  # transformers' own reads the clock
        theirs = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=True, return_dict=False)
        assert theirs == wanted
    for row in forms:
        assert prompt_ids(chat, row) == wanted
        ((chosen, rejected),) = [(p.chosen, p.rejected) for p in preference_pairs(chat, row, 512)]
        assert chosen.ids[: len(wanted)].tolist() == wanted == rejected.ids[: len(wanted)].tolist()
        assert [chat.text(s.ids[s.scored].tolist()) for s in (chosen, rejected)] == ["Eight.", "Nine."]


@pytest.mark.parametrize("family", real_tokenizers.FAMILIES)
def test_a_row_of_prompt_and_response_trains_on_the_tokens_of_its_messages(family):
    chat = chat_format(real_tokenizers.tokenizer(family))
    plain = seed_row({"prompt": "q?", "response": "a.", "system": "Be brief."}, "sft", None, {})
    history = {"instruction": "q?", "output": "a.", "system": "Be brief."}
    for longest in (512, 20):  # whole, and without the left end
        (one,), (other,) = (
            sft_sequences(chat, row, longest, everything=False)
            for row in (plain, seed_row(history, "sft", "alpaca", {}))
        )
        assert one.ids.tolist() == other.ids.tolist()
        assert one.scored.tolist() == other.scored.tolist()
        assert one.shortened == other.shortened


def test_a_thought_beside_an_answer_is_learned_and_not_only_the_answer():
    thinks, other = ({"role": "assistant", "content": "Eight.", "reasoning_content": t} for t in ("4 * 2", "9 - 1"))
    pair = seed_row({"chosen": [*TALK, thinks], "rejected": [*TALK, other]}, "preference", None, {})
    chat = chat_format(real_tokenizers.tokenizer("qwen3"))
    (found,) = preference_pairs(chat, pair, 512)
    for sequence, thought in ((found.chosen, "4 * 2"), (found.rejected, "9 - 1")):
        said = chat.tokenizer.decode(sequence.ids[sequence.scored])
        assert thought in said
        assert "Eight." in said
    blind = chat_format(real_tokenizers.tokenizer("llama3_1"))  # its template shows no thoughts
    with pytest.raises(BadInput, match="chosen and rejected are the same tokens"):
        preference_pairs(blind, pair, 512)

"""The real families' tokenizers and templates, and all templates of TRL's: training tokens against the rendered whole."""

import re
from functools import cache

import pytest
import real_tokenizers
from chat_tokenizers import bytes_tokenizer

from trainers.contract import BadInput
from trainers.core.chat import ChatFormat, chat_format
from trainers.core.encode import conversation, sft_sequences

QUESTION = [{"role": "user", "content": "What is  2+2?\n"}]
TALK = [
    *QUESTION,
    {"role": "assistant", "content": "It's 4, of course."},
    {"role": "user", "content": "And 3+3?"},
    {"role": "assistant", "content": "Six: é 日本 😀\n\n  - yes"},
]
THOUGHT = "<think>\nTwo and two.\n</think>\n\nIt's 4."
ENDS = {
    "deepseek_v3": {"<｜end▁of▁sentence｜>"},
    "gemma3": {"<end_of_turn>"},
    "gptoss": {"<|return|>"},
    "llama3_1": {"<|eot_id|>"},
    "qwen3": {"<|im_end|>"},
    "smollm2": {"<|im_end|>"},
}
IMAGES = {"idefics3", "llava_next", "smolvlm"}
"""Templates that show parts of messages, not texts."""


SEPARATE = ("deepseek", "gptoss", "nemotron")
SEPARATE_UNLESS_TRAINING = ("glm4moe", "qwen3", "qwen3_5_nothink", "qwen3_5_think", "qwen3_6")
"""Templates that show earlier turns otherwise than they asked for them (docs/conversations.md has the table)."""


@cache
def family(name: str) -> ChatFormat:
    return chat_format(real_tokenizers.smollm2() if name == "smollm2" else real_tokenizers.tokenizer(name))


@cache
def trl(name: str) -> ChatFormat:
    """A template of TRL's on a tokenizer of bytes that has all its marks."""
    template = real_tokenizers.trl_template(name)
    tokenizer = bytes_tokenizer(template)
    marks = set(re.findall(r"<[|｜/a-zA-Z_][^<>\n ']*>", template)) - set(tokenizer.all_special_tokens)
    tokenizer.add_special_tokens({"extra_special_tokens": sorted(marks)})
    return chat_format(tokenizer)


def rendered(chat: ChatFormat, messages) -> list[int]:
    """transformers' rendering encoded as one text by transformers."""
    template = re.sub(r"strftime_now\(.%Y-%m-%d.\)", "'2024-07-26'", chat.tokenizer.chat_template)
    text = chat.tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False)
    return chat.tokenizer(text, add_special_tokens=False)["input_ids"]


def check_turns(chat: ChatFormat, talk) -> None:
    turns = chat.turns(talk)
    for (prompt, response), last in zip(turns, (2, 4), strict=True):
        assert prompt == chat.prompt(talk[: last - 1]), "training starts from what generation starts from"
        assert response[-1] in chat.stop_ids
        assert sum(token in chat.stop_ids for token in response) == 1
        assert chat.text(response) == talk[last - 1]["content"]
        half = response[: len(response) // 2]
        cut = chat.answer(talk[: last - 1], chat.text(half), ended=False)[1]
        assert chat.tokenizer.decode(cut).rstrip() == chat.tokenizer.decode(half).rstrip()
    sequences = conversation(turns, 10**6)
    learned = [token for s in sequences for token in s.ids[s.scored].tolist()]
    assert learned == [token for _, response in turns for token in response]


@pytest.mark.parametrize("name", [*real_tokenizers.FAMILIES, "smollm2"])
def test_a_familys_training_tokens_are_those_of_the_rendered_conversation(name):
    chat = family(name)
    check_turns(chat, TALK)
    for last in (2, 4):
        prompt, response = chat.turns(TALK[:last])[-1]
        assert rendered(chat, TALK[:last])[: len(prompt + response)] == prompt + response
    assert {chat.tokenizer.decode([token]) for token in chat.stop_ids} == ENDS[name]


@pytest.mark.parametrize("name", [n for n in real_tokenizers.FAMILIES if n not in ("qwen3", "gptoss")])
def test_a_template_that_only_appends_makes_one_sequence_of_a_conversation(name):
    chat = family(name)
    (sequence,) = conversation(chat.turns(TALK), 10**6)
    assert sequence.ids.tolist() == rendered(chat, TALK)[: len(sequence)]


@pytest.mark.parametrize("name", ["qwen3", "gptoss"])
def test_a_template_that_changes_earlier_turns_makes_one_of_every_answer(name):
    assert len(conversation(family(name).turns(TALK), 10**6)) == 2


def test_where_everything_is_learned_what_sequences_share_is_learned_once():
    chat = family("qwen3")
    first, second = sft_sequences(chat, {"messages": TALK}, 10**6, everything=True)
    prompt = len(chat.prompt(QUESTION))
    assert first.scored.all()
    assert second.scored.tolist() == [False] * prompt + [True] * (len(second) - prompt)


def test_qwen3_learns_each_thought_where_it_is_asked_for():
    chat = family("qwen3")
    talk = [{**m, "content": THOUGHT} if m["role"] == "assistant" else m for m in TALK]
    for prompt, response in chat.turns(talk):
        assert chat.tokenizer.decode(response) == THOUGHT + "<|im_end|>"
        assert "Two and two" not in chat.tokenizer.decode(prompt)
        assert chat.text(response) == THOUGHT
    cut = chat.answer(QUESTION, THOUGHT[:15], ended=False)[1]
    assert chat.tokenizer.decode(cut) == THOUGHT[:15]


def test_gpt_oss_output_of_several_channels_comes_back_as_it_was():
    chat = family("gptoss")
    raw = "<|channel|>analysis<|message|>Sum.<|end|><|start|>assistant<|channel|>final<|message|>Four.<|return|>"
    ids = chat.tokenizer(raw, add_special_tokens=False)["input_ids"]
    assert chat.answer(QUESTION, chat.text(ids))[1] == ids
    cut = chat.tokenizer(raw, add_special_tokens=False)["input_ids"][:5]
    assert chat.answer(QUESTION, chat.text(cut), ended=False)[1] == cut


def test_gemma_takes_no_turns_that_do_not_alternate():
    chat = family("gemma3")
    with pytest.raises(BadInput, match="refuses a conversation of user, user: Conversation roles must alternate"):
        chat.prompt([*QUESTION, *QUESTION])


def test_a_gemma_without_system_turns_says_so():
    with pytest.raises(BadInput, match="refuses a conversation of system, user: System role not supported"):
        trl("gemma").prompt([{"role": "system", "content": "be brief"}, *QUESTION])


@pytest.mark.parametrize("name", ["llama3_2", "gptoss"])
def test_a_familys_date_stands_still(name):
    text = trl(name).prompt_text(QUESTION)
    assert "26 Jul 2024" in text or "2024-07-26" in text


@pytest.mark.parametrize("name", real_tokenizers.trl_template_names())
def test_every_template_of_trl_trains_what_it_prompts_for(name):
    if name.removesuffix("_training") in IMAGES:
        with pytest.raises(BadInput, match=r"leaves out the text|refuses"):
            trl(name)
        return
    check_turns(trl(name), TALK)
    separate = name.startswith(SEPARATE) or name in SEPARATE_UNLESS_TRAINING
    assert len(conversation(trl(name).turns(TALK), 10**6)) == (2 if separate else 1)


@pytest.mark.parametrize("name", [n for n in real_tokenizers.trl_template_names() if n.endswith("_training")])
def test_what_is_learned_is_what_trls_templates_mark_as_generated(name):
    """TRL's training templates mark the assistant's tokens; ours are found without marks."""
    if name.removesuffix("_training") in IMAGES:
        return
    chat = trl(name)
    marked = chat.tokenizer.apply_chat_template(
        TALK[:2], return_dict=True, return_assistant_tokens_mask=True, add_special_tokens=False
    )
    theirs = [i for i, flag in zip(marked["input_ids"], marked["assistant_masks"], strict=True) if flag]
    learned = chat.tokenizer.decode(chat.turns(TALK[:2])[0][1])
    assert learned[learned.index(TALK[1]["content"]) :] in chat.tokenizer.decode(theirs)


# ---------------------------------------------------------------- tools


ADD = {
    "name": "add",
    "description": "Adds.",
    "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}},
}
CALLS = [
    {"role": "user", "content": "2+2?"},
    {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"id": "call00001", "type": "function", "function": {"name": "add", "arguments": {"a": 2}}}],
    },
    {"role": "tool", "content": "four", "name": "add", "tool_call_id": "call00001"},
    {"role": "assistant", "content": "It is 4."},
]
WITH_TOOLS = [{"role": "tools", "tools": [{"type": "function", "function": ADD}]}, *CALLS]
NO_DEFINITIONS = {
    "cohere",
    "cohere2",
    "deepseek_r1_distill",
    "deepseekv3",
    "gemma",
    "gemma3",
    "llama3",
    "phi3",
    "phi3_5",
}
NO_CALLS = (NO_DEFINITIONS - {"deepseekv3"}) | {"lfm2"}
NO_DEFINITIONS |= {"qwen2_5_vl"}
NO_CALLS |= {"qwen2_5_vl"}


@pytest.mark.parametrize("name", [n for n in real_tokenizers.trl_template_names() if not n.endswith("_training")])
def test_calls_of_tools_are_learned_where_a_template_shows_them(name):
    if name in IMAGES:
        return
    chat = trl(name)
    if name in NO_CALLS:
        with pytest.raises(BadInput, match="shows no calls of tools"):
            chat.turns(CALLS)
        return
    (_, call), (prompt, answer) = chat.turns(CALLS)
    assert "add" in chat.tokenizer.decode(call)
    assert "four" in chat.tokenizer.decode(prompt)
    assert "It is 4." in chat.tokenizer.decode(answer)


@pytest.mark.parametrize("name", [n for n in real_tokenizers.trl_template_names() if not n.endswith("_training")])
def test_definitions_of_tools_are_shown_or_refused(name):
    if name in IMAGES:
        return
    if name in NO_DEFINITIONS:
        with pytest.raises(BadInput, match="shows no definitions of tools"):
            trl(name).prompt(WITH_TOOLS[:2])
    else:
        assert "Adds." in trl(name).prompt_text(WITH_TOOLS[:2])


def test_tools_of_a_real_family_become_the_tokens_that_transformers_gives():
    chat = family("qwen3")
    text = chat.tokenizer.apply_chat_template(CALLS, tools=WITH_TOOLS[0]["tools"], tokenize=False)
    prompt, answer = chat.turns(WITH_TOOLS)[-1]
    ids = chat.tokenizer(text, add_special_tokens=False)["input_ids"]
    assert ids[: len(prompt + answer)] == prompt + answer


def test_the_plain_format_has_no_tools():
    with pytest.raises(BadInput, match="plain format has no tools"):
        chat_format(bytes_tokenizer(None)).turns(CALLS)

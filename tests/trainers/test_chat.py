"""Token ids of conversations: what is trained is what is generated from; masks, BOS, end tokens, refusals."""

import re
from functools import cache

import pytest
from chat_tokenizers import CHATML, OPEN, QUESTION, TALK, TEMPLATES, THOUGHTS, WITH_BOS, bytes_tokenizer, shown, whole
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from trainers.contract import BadInput
from trainers.core.chat import ChatFormat, chat_format


@pytest.fixture(params=TEMPLATES)
def chat(request) -> ChatFormat:
    return chat_format(bytes_tokenizer(TEMPLATES[request.param]))


@pytest.mark.parametrize("template", [CHATML, WITH_BOS, None])
def test_prompt_and_answer_are_the_rendered_conversation(template):
    chat = chat_format(bytes_tokenizer(template))
    expected = {
        CHATML: ("<|start|>user\nhi<|end|>\n<|start|>assistant\n", "so so<|end|>"),
        WITH_BOS: ("<bos>[user] hi[assistant] ", "so so<eos>"),
        None: ("User: hi\n\nAssistant:", " so so<eos>"),
    }
    assert tuple(shown(chat, ids) for ids in chat.answer(QUESTION, "so so")) == expected[template]


def test_an_answer_follows_the_tokens_that_prompt_for_it(chat):
    for prompt, response in chat.turns(TALK):
        assert response[-1] in chat.stop_ids
        assert sum(token in chat.stop_ids for token in response) == 1
        assert prompt in [chat.prompt(TALK[:2]), chat.prompt(TALK[:4])]


def test_training_tokens_are_those_of_the_rendered_conversation(chat):
    """Each answer, with its prompt, begins as the conversation that ends with it does when it is encoded as one."""
    for last in (3, 5):
        prompt, response = chat.turns(TALK[:last])[-1]
        ids = whole(chat, TALK[:last])
        learned = response[:-1] if chat.tokenizer.chat_template == OPEN else response  # it writes no end
        assert (prompt + learned) == ids[: len(prompt + learned)]
        assert not shown(chat, ids[len(prompt + learned) :]).strip()


@pytest.mark.parametrize("template", [CHATML, WITH_BOS, None])
def test_no_token_is_learned_that_no_prompt_shows(template):
    """With ChatML and another end-of-text token (Qwen2.5), and in the plain format: every turn ends as in the prompts."""
    chat = chat_format(bytes_tokenizer(template, eos="<eos>"))
    (_, first), (prompt, _) = chat.turns(TALK)
    start = chat.prompt(TALK[:2])
    assert prompt[: len(start) + len(first)] == start + first


def test_the_templates_end_of_turn_ends_a_response():
    tokenizer = bytes_tokenizer(CHATML, eos="<eos>")
    end, eos = tokenizer.convert_tokens_to_ids(["<|end|>", "<eos>"])
    assert chat_format(tokenizer).stop_ids == {eos, end}


@pytest.mark.parametrize(
    ("after", "end"),
    [
        ("<|end|>\n{% if loop.last and not add_generation_prompt %}<eos>{% endif %}", "<|end|>"),  # Phi-3
        ("{{ '<pad>' if loop.last else '<|end|>' }}", "<pad>"),  # gpt-oss
        ("<|end|><pad>", "<pad>"),  # Cohere
        ("\n", "<eos>"),
    ],
)
def test_end_of_turn_where_templates_close_more_than_a_turn(after, end):
    template = (
        "{% for m in messages %}<|start|>{{ m.role }}\n{{ m.content }}" + after + "{% endfor %}"
        "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
    )
    chat = chat_format(bytes_tokenizer(template, eos="<eos>"))
    assert shown(chat, chat.answer(QUESTION, "so")[1][-1:]) == end
    assert chat.stop_ids == set(chat.tokenizer.convert_tokens_to_ids(["<eos>", end]))


def test_blank_added_tokens_end_nothing():
    """Gemma has added tokens for runs of line breaks."""
    tokenizer = bytes_tokenizer(OPEN)
    tokenizer.add_tokens(["\n"])
    assert chat_format(tokenizer).stop_ids == {tokenizer.eos_token_id}


def test_generation_settings_may_name_more_end_tokens():
    tokenizer = bytes_tokenizer(OPEN)
    pad, eos = tokenizer.convert_tokens_to_ids(["<pad>", "<eos>"])
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), eos_token_id=None, **sizes))
    assert chat_format(tokenizer, model).stop_ids == {eos}
    model.generation_config.eos_token_id = [pad]
    assert chat_format(tokenizer, model).stop_ids == {eos, pad}


def test_a_tokenizer_without_end_token_is_refused():
    tokenizer = bytes_tokenizer(CHATML)
    tokenizer.eos_token = None
    with pytest.raises(BadInput, match="no end-of-sequence token"):
        chat_format(tokenizer)


@pytest.mark.parametrize("adds_bos", [True, False])
def test_exactly_one_bos_where_the_template_has_one(adds_bos):
    """The tokenizer's own BOS must not come on top of the template's."""
    chat = chat_format(bytes_tokenizer(WITH_BOS, adds_bos=adds_bos))
    bos = chat.tokenizer.bos_token_id
    prompt, response = chat.turns(TALK)[-1]
    assert prompt[0] == bos
    assert (prompt + response).count(bos) == 1


def test_no_bos_where_the_template_has_none():
    chat = chat_format(bytes_tokenizer(CHATML, adds_bos=True))
    assert chat.tokenizer.bos_token_id not in [*chat.prompt(QUESTION), *chat.answer(QUESTION, "x")[1]]


@pytest.mark.parametrize("adds_bos", [True, False])
def test_the_plain_format_has_the_tokenizers_bos(adds_bos):
    chat = chat_format(bytes_tokenizer(None, adds_bos=adds_bos))
    prompt, response = chat.turns(TALK)[-1]
    bos = "<bos>" if adds_bos else ""
    expected = "System: be brief\n\nUser: hi\n\nAssistant: hello you<eos>\n\nUser: more?\n\nAssistant: no<eos>"
    assert shown(chat, prompt + response) == bos + expected


def test_an_assistants_greeting_is_not_learned(chat):
    greeting = [{"role": "assistant", "content": "welcome"}]
    assert len(chat.turns(greeting + TALK[1:])) == 2
    assert chat.turns(greeting) == []


# ---------------------------------------------------------------- answers that were cut off


def test_what_was_cut_off_has_no_end(chat):
    prompt, response = chat.answer(QUESTION, "so so", ended=False)
    assert prompt == chat.prompt(QUESTION)
    assert not chat.stop_ids & set(response)
    assert shown(chat, response).endswith("so so")
    assert chat.answer(QUESTION, "", ended=False)[1] == [] or chat.tokenizer.chat_template in (THOUGHTS, None)


@pytest.mark.parametrize("text", ["<think>\nhm", "<think>\nhm\n</think>\n\nso"])
def test_a_cut_off_thought_is_not_put_behind_an_empty_one(text):
    chat = chat_format(bytes_tokenizer(THOUGHTS))
    assert shown(chat, chat.answer(QUESTION, text, ended=False)[1]) == text
    assert shown(chat, chat.answer(QUESTION, text)[1]) == text + "<|end|>"
    assert shown(chat, chat.answer(QUESTION, "so", ended=False)[1]) == "<think>\n\n</think>\n\nso"


# ---------------------------------------------------------------- tokenizers that mark blanks, or join across a border


LLAMA2 = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ bos_token }}[INST] {{ m.content }} [/INST]"
    "{% else %} {{ m.content }} {{ eos_token }}{% endif %}{% endfor %}"
)
ZEPHYR = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
TEXTS = ["so so", "hello you", "hi there, you", "[INST] more [/INST]", "line\n\nline"]


def metaspace_tokenizer(template: str | None, scheme: str) -> PreTrainedTokenizerFast:
    """A SentencePiece tokenizer as Llama 2 (``legacy``: a mark before every piece) and Mistral (``first``) have it."""
    core = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    marks = [f"<0x{i:02X}>" for i in range(256)]
    if scheme == "legacy":
        core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    core.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    special = ["<unk>", "<s>", "</s>", "<|start|>", "<|end|>", *marks]
    core.train_from_iterator(
        TEXTS * 20, trainers.BpeTrainer(vocab_size=420, special_tokens=special, show_progress=False)
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="</s>"
    )
    tokenizer.chat_template = template
    return tokenizer


@pytest.mark.parametrize("scheme", ["legacy", "first", "always", "never"])
@pytest.mark.parametrize("template", [LLAMA2, ZEPHYR, CHATML, None])
def test_tokens_of_sentencepiece_tokenizers_are_those_of_the_whole_text(template, scheme):
    """Encoded apart, a response would begin with a blank mark that the whole text does not have."""
    chat = chat_format(metaspace_tokenizer(template, scheme))
    talk = [m for m in TALK if m["role"] != "system"]
    for last in (2, 4):
        prompt, response = chat.turns(talk[:last])[-1]
        ids = whole(chat, talk[:last])
        size = len(prompt + response)
        assert (prompt + response)[:-1] == ids[: size - 1]
        assert response[-1] in chat.stop_ids
        assert chat.text(response) == talk[last - 1]["content"]


def test_where_tokens_cross_the_border_the_prompt_keeps_its_own():
    """``Answer: `` and ``so`` are `` so`` when they are encoded as one, which generation would not start from."""
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token if m.role == 'assistant' else ' ' }}{% endfor %}"
    template += "{% if add_generation_prompt %}assistant: {% endif %}"
    for scheme in ("legacy", "first", "always"):
        chat = chat_format(metaspace_tokenizer(template, scheme))
        prompt, response = chat.answer(QUESTION, "so so")
        assert prompt == chat.prompt(QUESTION)
        assert whole(chat, [*QUESTION, {"role": "assistant", "content": "so so"}])[: len(prompt)] != prompt
        assert chat.tokenizer.convert_ids_to_tokens(response)[0].startswith("s")
        assert chat.tokenizer.decode(prompt + response).endswith("assistant: so so</s>")


# ---------------------------------------------------------------- texts


@given(st.lists(st.text(alphabet=st.sampled_from("ab \n<>[]{}/&\"'é你%|"), max_size=12), min_size=1, max_size=3))
def test_any_texts_give_prompts_that_answers_follow(texts):
    talk = [{"role": role, "content": text} for text in texts for role in ("user", "assistant")]
    for template in TEMPLATES.values():
        chat = _cached(template)
        for i, (prompt, response) in enumerate(chat.turns(talk)):
            assert prompt == chat.prompt(talk[: 2 * i + 1])
            assert sum(token in chat.stop_ids for token in response) == 1


@given(st.text(alphabet=st.sampled_from("ab \n<>[]{}/&\"'é你%|"), max_size=12))
def test_what_is_not_rendered_is_what_rendering_gives(text):
    for template in TEMPLATES.values():
        chat = _cached(template)
        question = [{"role": "user", "content": text}]
        prompt = chat._render(question, True)
        assert chat.prompt_text(question) == prompt
        answer = {"role": "assistant", "content": text}
        assert chat._turn(question, prompt, answer) == chat._rendered_turn(question, prompt, answer)


def test_ordinary_texts_are_not_rendered(monkeypatch):
    chat = chat_format(bytes_tokenizer(CHATML))
    chat.answer(QUESTION, "first")
    rendered = []
    monkeypatch.setitem(chat.__dict__, "_render", lambda *args: rendered.append(args) or "")
    prompt, response = chat.answer([{"role": "user", "content": "two words"}], "It's 5, isn't it?")
    assert (
        shown(chat, prompt + response)
        == "<|start|>user\ntwo words<|end|>\n<|start|>assistant\nIt's 5, isn't it?<|end|>"
    )
    assert not rendered


@cache
def _cached(template: str | None) -> ChatFormat:
    return chat_format(bytes_tokenizer(template))


def test_pad_that_is_eos_is_still_learned():
    """Masking by pad id instead of by length hides the end token, and the model never learns to stop."""
    tokenizer = bytes_tokenizer(WITH_BOS, pad=None)
    tokenizer.pad_token = tokenizer.eos_token
    response = chat_format(tokenizer).answer(QUESTION, "so")[1]
    assert response[-1] == tokenizer.pad_token_id == tokenizer.eos_token_id


def test_what_a_tokenizer_file_asks_for_does_not_cut_texts():
    """tokenizer.json may hold truncation and padding; they are for other programs."""
    tokenizer = bytes_tokenizer(CHATML)
    tokenizer.backend_tokenizer.enable_truncation(4)
    tokenizer.backend_tokenizer.enable_padding(length=50)
    chat = chat_format(tokenizer)
    assert shown(chat, chat.answer(QUESTION, "a longer response")[1]).startswith("a longer response")
    assert len(chat.answer(QUESTION, "short")[1]) < 10


def test_decoded_text_has_no_end_token_and_no_form(chat):
    assert chat.text(chat.answer(QUESTION, "so so")[1]) == "so so"
    assert chat.text(chat.answer(QUESTION, "so so", ended=False)[1]).endswith("so so")


def test_the_text_of_a_thought_keeps_its_marks_even_if_they_are_special():
    tokenizer = bytes_tokenizer(CHATML)
    tokenizer.add_special_tokens({"extra_special_tokens": ["<think>", "</think>"]})
    chat = chat_format(tokenizer)
    assert chat.text(chat.answer(QUESTION, "<think>hm</think>so")[1]) == "<think>hm</think>so"


def test_a_reply_that_says_an_end_token_in_its_middle_is_not_learned_in_part(chat):
    for end in (shown(chat, [token]) for token in chat.stop_ids):
        for text in (f"The token {end} ends a turn.", f"{end}{end} ends", f"so {end}\n{end} so"):
            with pytest.raises(BadInput, match=re.escape(f"the text of the end token {end!r} before its end")):
                chat.taught(QUESTION, text)
            with pytest.raises(BadInput, match="before its end"):
                chat.taught(QUESTION, text, ended=False)
            with pytest.raises(BadInput, match="before its end"):
                chat.turns([*TALK[:2], {"role": "assistant", "content": text}, *TALK[3:]])
            chat.turns([{"role": "user", "content": text}, TALK[2]])  # it is only read


def test_a_call_or_a_thought_behind_which_more_follows_holds_no_end_token():
    chat = chat_format(bytes_tokenizer(CHATML))
    call = {"type": "function", "function": {"name": "echo", "arguments": {"text": "<|end|>"}}}
    for more in ({"tool_calls": [call]}, {"reasoning_content": "hm<|end|>"}):
        with pytest.raises(BadInput, match="before its end"):
            chat.taught(QUESTION, {"role": "assistant", "content": "so", **more})


def test_a_reply_that_ends_with_its_end_token_is_the_reply_without(chat):
    """As the raw output of a model does, whichever of its end tokens it chose, padding included."""
    for end in (shown(chat, [token]) for token in chat.stop_ids):
        for text in (f"so so{end}", f"so so{end}{end}\n"):
            prompt, response = chat.taught(QUESTION, text)
            assert chat.text(response) == "so so"
            assert prompt == chat.prompt(QUESTION)
            assert [token in chat.stop_ids for token in response] == [False] * (len(response) - 1) + [True]

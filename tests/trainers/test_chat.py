"""Token ids of conversations: masks, BOS, end tokens, and the shortcut that spares rendering."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from trainers.contract import BadInput
from trainers.core import chat as chat_module
from trainers.core.chat import ChatFormat, chat_format

CHATML = (
    "{% for m in messages %}<|start|>{{ m.role }}\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
# BOS once, at the very front, as in Llama and Gemma; contents are stripped, as in Gemma.
WITH_BOS = (
    "{{ bos_token }}{% for m in messages %}[{{ m.role }}] {{ m.content | trim }}"
    "{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)
# Leaves the response open: no end token.
OPEN = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
# Drops earlier reasoning once another turn follows, as Qwen3 and DeepSeek do.
REWRITES = (
    "{% for m in messages %}<|start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and not loop.last %}{{ m.content.split('</think>')[-1] }}"
    "{% else %}{{ m.content }}{% endif %}<|end|>\n{% endfor %}{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
SPECIAL = ["<bos>", "<eos>", "<pad>", "<|start|>", "<|end|>"]
TALK = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "hello you"},
    {"role": "user", "content": "more?"},
    {"role": "assistant", "content": "no"},
]
QUESTION = [{"role": "user", "content": "hi"}]


def bytes_tokenizer(template: str | None, eos: str = "<eos>", pad: str | None = "<pad>", adds_bos: bool = False):
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(SPECIAL)
    if adds_bos:
        core.post_processor = processors.TemplateProcessing(
            single="<bos> $A", special_tokens=[("<bos>", core.token_to_id("<bos>"))]
        )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<bos>", eos_token=eos, pad_token=pad)
    tokenizer.chat_template = template
    return tokenizer


def shown(chat: ChatFormat, ids: list[int]) -> str:
    return chat.tokenizer.decode(ids, skip_special_tokens=False)


@pytest.mark.parametrize("template", [CHATML, WITH_BOS, None])
def test_prompt_and_response_are_the_rendered_conversation(template):
    chat = chat_format(bytes_tokenizer(template, eos="<|end|>" if template == CHATML else "<eos>"))
    text = shown(chat, chat.prompt(QUESTION)) + shown(chat, chat.response("so so"))
    expected = {
        CHATML: "<|start|>user\nhi<|end|>\n<|start|>assistant\nso so<|end|>",
        WITH_BOS: "<bos>[user] hi[assistant] so so<eos>",
        None: "User: hi\n\nAssistant: so so<eos>",
    }
    assert text == expected[template]


def test_only_assistant_turns_are_learned_with_their_end_tokens():
    chat = chat_format(bytes_tokenizer(CHATML, eos="<|end|>"))
    ids, scored = chat.conversation(TALK)
    learned = [shown(chat, [token]) for token, flag in zip(ids, scored, strict=True) if flag]
    assert "".join(learned) == "hello you<|end|>no<|end|>"
    rendered = chat.tokenizer.apply_chat_template(TALK, tokenize=False)
    assert shown(chat, ids) == rendered


def test_a_conversation_of_one_turn_is_prompt_and_response():
    for template in (CHATML, WITH_BOS, None):
        chat = chat_format(bytes_tokenizer(template, adds_bos=True, eos="<|end|>" if template == CHATML else "<eos>"))
        ids, scored = chat.conversation([*QUESTION, {"role": "assistant", "content": "so so"}])
        prompt, response = chat.prompt(QUESTION), chat.response("so so")
        learned = [token for token, flag in zip(ids, scored, strict=True) if flag]
        assert learned == response
        assert ids[: len(prompt)] == prompt


@pytest.mark.parametrize("adds_bos", [True, False])
def test_exactly_one_bos_where_the_template_has_one(adds_bos):
    """The tokenizer's own BOS must not come on top of the template's."""
    chat = chat_format(bytes_tokenizer(WITH_BOS, adds_bos=adds_bos))
    bos = chat.tokenizer.bos_token_id
    prompt = chat.prompt(QUESTION)
    assert prompt.count(bos) == 1
    assert prompt[0] == bos
    assert chat.conversation(TALK)[0].count(bos) == 1
    assert bos not in chat.response("so so")


def test_no_bos_where_the_template_has_none():
    chat = chat_format(bytes_tokenizer(CHATML, adds_bos=True))
    assert chat.tokenizer.bos_token_id not in chat.prompt(QUESTION) + chat.response("x")


@pytest.mark.parametrize("adds_bos", [True, False])
def test_the_plain_format_has_the_tokenizers_bos(adds_bos):
    chat = chat_format(bytes_tokenizer(None, adds_bos=adds_bos))
    prompt = chat.prompt([{"role": "system", "content": "be brief"}, *QUESTION])
    assert shown(chat, prompt) == ("<bos>" if adds_bos else "") + "System: be brief\n\nUser: hi\n\nAssistant: "
    assert chat.conversation(TALK)[0].count(chat.tokenizer.bos_token_id) == int(adds_bos)


@pytest.mark.parametrize("template", [CHATML, WITH_BOS, OPEN, None])
def test_a_response_ends_with_one_learned_end_token(template):
    chat = chat_format(bytes_tokenizer(template, eos="<|end|>" if template == CHATML else "<eos>"))
    response = chat.response("so so")
    assert response[-1] in chat.stop_ids
    assert sum(token in chat.stop_ids for token in response) == 1
    ids, scored = chat.conversation(TALK)
    ends = [flag for token, flag in zip(ids, scored, strict=True) if token in chat.stop_ids and flag]
    assert len(ends) == 2


def test_pad_that_is_eos_stays_in_the_mask():
    """Masking by pad id instead of by length hides the end token, and the model never learns to stop."""
    tokenizer = bytes_tokenizer(WITH_BOS, pad=None)
    tokenizer.pad_token = tokenizer.eos_token
    chat = chat_format(tokenizer)
    ids, scored = chat.conversation(TALK[:3])
    assert ids[-1] == tokenizer.pad_token_id == tokenizer.eos_token_id
    assert scored[-1]


def test_generation_settings_may_name_more_end_tokens():
    class Model:
        class generation_config:
            eos_token_id = None

    tokenizer = bytes_tokenizer(CHATML)
    end, eos = tokenizer.convert_tokens_to_ids(["<|end|>", "<eos>"])
    assert chat_format(tokenizer, Model).stop_ids == {eos}
    Model.generation_config.eos_token_id = [end]
    chat = chat_format(tokenizer, Model)
    assert chat.stop_ids == {eos, end}
    assert shown(chat, chat.response("so")) == "so<|end|>"


def test_a_tokenizer_without_end_token_is_refused():
    tokenizer = bytes_tokenizer(CHATML)
    tokenizer.eos_token = None
    with pytest.raises(BadInput, match="no end-of-sequence token"):
        chat_format(tokenizer)


def test_a_template_that_rewrites_history_is_an_error():
    chat = chat_format(bytes_tokenizer(REWRITES, eos="<|end|>"))
    turns = [dict(m) for m in TALK]
    assert chat.conversation(turns)[0], "nothing is rewritten here"
    turns[2]["content"] = "<think>hm</think>hello you"
    with pytest.raises(BadInput, match="changes earlier text"):
        chat.conversation(turns)


# ---------------------------------------------------------------- the shortcut


def rendered_only(chat: ChatFormat, monkeypatch: pytest.MonkeyPatch, function, *args) -> list[int]:
    with monkeypatch.context() as patch:
        patch.setattr(chat_module, "_framed", lambda frame, text: None)
        return function(*args)


TEXTS = st.text(alphabet=st.sampled_from("ab \n<>[]{}/&\"'é你%|"), max_size=12)


@pytest.mark.parametrize("template", [CHATML, WITH_BOS, OPEN, REWRITES, None])
def test_the_shortcut_gives_what_rendering_gives(template):
    chat = chat_format(bytes_tokenizer(template))
    with pytest.MonkeyPatch.context() as monkeypatch:

        @given(TEXTS)
        def check(text):
            messages = [{"role": "user", "content": text}]
            assert chat.response(text) == rendered_only(chat, monkeypatch, chat.response, text)
            assert chat.prompt(messages) == rendered_only(chat, monkeypatch, chat.prompt, messages)

        check()


def test_the_shortcut_is_taken_for_ordinary_texts(monkeypatch):
    chat = chat_format(bytes_tokenizer(CHATML))
    chat.response("first")
    chat.prompt(QUESTION)
    rendered = []
    monkeypatch.setattr(ChatFormat, "_render", lambda *args, **kwargs: rendered.append(args) or "")
    assert shown(chat, chat.response("It's 5, isn't it?")).startswith("It's 5")
    assert shown(chat, chat.prompt([{"role": "user", "content": "two words"}])).startswith("<|start|>user\ntwo words")
    assert not rendered


@pytest.mark.parametrize("change", ["| upper", "| replace('&', 'and')", "~ m.content"])
def test_the_shortcut_is_not_taken_where_texts_are_changed(change):
    chat = chat_format(bytes_tokenizer(CHATML.replace("{{ m.content }}", f"{{{{ m.content {change} }}}}")))
    expected = {"| upper": "SO & SO", "| replace('&', 'and')": "so and so", "~ m.content": "so & soso & so"}[change]
    assert shown(chat, chat.response("so & so")).startswith(expected)


def test_what_a_tokenizer_file_asks_for_does_not_cut_texts():
    """tokenizer.json may hold truncation and padding; they are for other programs."""
    tokenizer = bytes_tokenizer(CHATML)
    tokenizer.backend_tokenizer.enable_truncation(4)
    tokenizer.backend_tokenizer.enable_padding(length=50)
    chat = chat_format(tokenizer)
    assert shown(chat, chat.response("a longer response")).startswith("a longer response")
    assert len(chat.response("short")) < 10


def test_decoded_text_has_no_end_token():
    chat = chat_format(bytes_tokenizer(CHATML, eos="<|end|>"))
    assert chat.text(chat.response("so so")) == "so so"

"""Chat templates with a form of their own, with mistakes, and with dates in them."""

import datetime

import pytest
from chat_tokenizers import CHATML, OPEN, QUESTION, TALK, THOUGHTS, bytes_tokenizer, shown

from trainers.contract import BadInput
from trainers.core.chat import chat_format
from trainers.core.templates import with_settings

# ---------------------------------------------------------------- templates with a form of their own


def test_templates_that_change_earlier_turns_prompt_for_each_as_they_ask():
    chat = chat_format(bytes_tokenizer(THOUGHTS))
    turns = [dict(m) for m in TALK]
    turns[2]["content"] = "<think>\nhm\n</think>\n\nhello you"
    (first, thought), (second, answer) = chat.turns(turns)
    assert shown(chat, thought) == "<think>\nhm\n</think>\n\nhello you<|end|>"
    assert shown(chat, answer) == "<think>\n\n</think>\n\nno<|end|>"
    assert first == chat.prompt(turns[:2])
    assert second == chat.prompt(turns[:4])
    assert "hm" not in shown(chat, second)


@pytest.mark.parametrize(
    ("asks", "text", "learned"),
    [
        ("<think>\n", "so", "\n</think>\n\nso<|end|>"),
        ("<think>\n", "hm\n</think>\n\nso", "hm\n</think>\n\nso<|end|>"),
        ("<think>\n", "<think>\nhm\n</think>\n\nso", "hm\n</think>\n\nso<|end|>"),
        ("<think>\n\n</think>\n\n", "so", "so<|end|>"),
        ("<think>\n\n</think>\n\n", "<think>\nhm\n</think>\n\nso", "so<|end|>"),
    ],
)
def test_prompts_that_open_or_close_a_thought(asks, text, learned):
    """R1 and Qwen3 without thinking; their templates show answers without what the prompt ends with."""
    template = CHATML.replace("<|start|>assistant\n", "<|start|>assistant\n" + asks)
    chat = chat_format(bytes_tokenizer(template))
    assert shown(chat, chat.answer(QUESTION, text)[1]) == learned
    assert shown(chat, chat.answer(QUESTION, "hm", ended=False)[1]) == "hm"


def test_a_prompt_that_answers_do_not_follow_is_refused():
    template = CHATML.replace("<|start|>assistant\n", "<|start|>assistant says:\n")
    with pytest.raises(BadInput, match="otherwise than it asks for it"):
        chat_format(bytes_tokenizer(template))


@pytest.mark.parametrize("change", ["| upper", "| replace('&', 'and')", "~ m.content"])
def test_texts_are_learned_as_the_template_shows_them(change):
    chat = chat_format(bytes_tokenizer(CHATML.replace("{{ m.content }}", f"{{{{ m.content {change} }}}}")))
    expected = {"| upper": "SO & SO", "| replace('&', 'and')": "so and so", "~ m.content": "so & soso & so"}[change]
    assert shown(chat, chat.answer(QUESTION, "so & so")[1]).startswith(expected)


def test_what_a_template_refuses_is_bad_input():
    template = "{% if messages[0].role == 'system' %}{{ raise_exception('no system turn here') }}{% endif %}" + CHATML
    chat = chat_format(bytes_tokenizer(template))
    with pytest.raises(BadInput, match=r"refuses a conversation of system, user: no system turn here"):
        chat.prompt(TALK[:2])


PROGRAMS = {
    "{{ 1 // (messages | length - 1) }}": "by zero",
    "{% for i in range(10**6) %}x{% endfor %}": "Range too big",
    "{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}": "recursion",
    "{% break %}": "outside loop",
    "{{ messages[5].content }}": "no element 5",
    "{{ messages.append(1) }}": "unsafe",
    "{{ nothing.at.all }}": "undefined",
    "{% if %}": "no valid template",
}


@pytest.mark.parametrize("template", PROGRAMS)
def test_what_a_template_fails_with_is_bad_input(template):
    with pytest.raises(BadInput, match=PROGRAMS[template]):
        chat_format(bytes_tokenizer(template)).prompt(TALK[1:2])


@pytest.mark.parametrize(
    ("template", "problem"),
    [
        ("{% for m in messages %}", "no valid template: .* \\(line 1\\)"),
        ("{% for m in messages %}{{ m.content.text.strip() }}{% endfor %}", "has no attribute 'text'"),
        ("{{ messages | length }}", "leaves out the text"),
        ({"tool_use": CHATML, "rag": CHATML}, "several chat templates \\(rag, tool_use\\) and none is the default"),
    ],
)
def test_a_template_that_cannot_be_used_is_refused_at_once(template, problem):
    with pytest.raises(BadInput, match=problem):
        chat_format(bytes_tokenizer(template))


def test_a_template_for_one_question_only_can_be_used():
    once = "{% if messages | length > 2 %}{{ raise_exception('one question') }}{% endif %}" + CHATML
    last = CHATML.replace("m in messages", "m in messages[-1:]")
    for template in (once, last):
        chat = chat_format(bytes_tokenizer(template, eos="<eos>"))
        assert shown(chat, chat.answer(QUESTION, "so")[1]) == "so<|end|>"


def test_of_several_templates_the_default_is_used():
    chat = chat_format(bytes_tokenizer({"default": CHATML, "tool_use": OPEN}))
    assert chat.prompt(QUESTION) == chat_format(bytes_tokenizer(CHATML)).prompt(QUESTION)


# ---------------------------------------------------------------- dates


DATED = (
    "{% if date_string is not defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}{{ date_string }} "
)


def test_a_template_that_asks_for_today_always_gets_the_same(monkeypatch):
    tokenizer = bytes_tokenizer(DATED + CHATML)
    assert shown(chat_format(tokenizer), chat_format(tokenizer).prompt(QUESTION)).startswith("26 Jul 2024 <|start|>")


@pytest.mark.parametrize("form", ["%Y-%m-%d", "%A, %B %-d %Y, %H:%M", "100%% %F %j"])
def test_every_form_of_a_date_is_that_days(form):
    day = datetime.date(2025, 3, 9)
    template = with_settings("{% set form = '" + form + "' %}{{ strftime_now(form) }}|" + CHATML, {}, day)
    chat = chat_format(bytes_tokenizer(template))
    assert chat.prompt_text(QUESTION).split("|")[0] == day.strftime(form)


def test_settings_are_part_of_the_template_and_a_callers_still_count():
    template = "{{ mode | default('none') }} {{ loud | default(true) }} {{ date_string | default('never') }} " + CHATML
    tokenizer = bytes_tokenizer(with_settings(template, {"mode": 'a "ü"', "loud": False}, datetime.date(2025, 3, 9)))
    assert chat_format(tokenizer).prompt_text(QUESTION).startswith('a "ü" False 09 Mar 2025 <|start|>')
    assert tokenizer.apply_chat_template(QUESTION, tokenize=False, mode="b").startswith("b False")


def test_settings_change_nothing_else_of_a_template():
    for start in ("\n\n", "  {% if true %}x{% endif %}\n", "{{- 'x' }}", "{#- note -#} y"):
        plain, settled = bytes_tokenizer(start + CHATML), bytes_tokenizer(with_settings(start + CHATML, {"a": 1}, None))
        assert chat_format(settled).prompt_text(QUESTION) == chat_format(plain).prompt_text(QUESTION)

"""Chat templates: rendered with a date that stands still, refusals as bad input, settings written into the text.

The plain format of a tokenizer without template is ``User: …\\n\\nAssistant: …<eos>`` with ``System: …\\n\\n`` before it
when there is a system turn; the end token stands after every answer, and the prompt ends without a blank, because most
tokenizers join a blank with the word behind it.
"""

import datetime
import json
from collections.abc import Callable, Mapping
from typing import Any

from jinja2 import Environment, TemplateError, TemplateSyntaxError, meta, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser

from trainers.contract import BadInput
from trainers.core.tools import Turns, with_tools

Messages = Turns

Render = Callable[[Messages, bool], str]
"""Text of a conversation; the second argument says whether the assistant is asked to speak next."""

DAY = datetime.date(2024, 7, 26)
"""Today, for templates that ask. Tokens of a run must not depend on when it runs; Llama 3 has the same default."""

DATE_CODES = ("a", "A", "b", "B", "d", "-d", "H", "I", "j", "m", "-m", "M", "p", "S", "U", "w", "W", "y", "Y", "F", "%")

PROGRAM_ERRORS = (
    TemplateError,
    TypeError,
    ValueError,
    LookupError,
    AttributeError,
    ArithmeticError,
    RecursionError,
    SyntaxError,
)
"""What a template can end in: it is a program, with divisions, macros that call themselves, and ranges that are limited."""


def renderer(tokenizer: Any) -> Render:
    """How a tokenizer's conversations become text. Raises BadInput for a template that is none."""
    template = template_of(tokenizer)
    if template is None:
        return lambda messages, generation: _plain(messages, generation, tokenizer.eos_token)
    dated = _clock(DAY) + template if "strftime_now" in template else template

    def render(messages: Messages, generation: bool, tools: list[Any] | None) -> str:
        try:
            return str(
                tokenizer.apply_chat_template(
                    messages, tools=tools, chat_template=dated, tokenize=False, add_generation_prompt=generation
                )
            )
        except TemplateSyntaxError as error:
            raise BadInput(f"the chat template is no valid template: {error.message} (line {error.lineno})") from error
        except PROGRAM_ERRORS as error:
            roles = ", ".join(str(message.get("role")) for message in messages)
            raise BadInput(f"the chat template refuses a conversation of {roles or 'no turns'}: {error}") from error

    return with_tools(render)


def with_settings(template: str, options: Mapping[str, bool | int | float | str], date: datetime.date | None) -> str:
    """The template with values for variables that it asks for, which a caller's own still override.

    They become part of the text, so that a model keeps them when it is saved, and is prompted as it was trained.
    """
    values = dict(options) | ({"date_string": date.strftime("%d %b %Y")} if date else {})
    lines = [
        f"{{% if {name} is not defined %}}{{% set {name} = {json.dumps(value, ensure_ascii=False)} %}}{{% endif %}}\n"
        for name, value in values.items()
    ]
    return "".join(lines) + (_clock(date) if date else "") + template


class _Generation(Extension):
    """The tag that transformers adds for an assistant's own words: here a scope like any other."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


GIVEN = frozenset({"messages", "tools", "documents", "add_generation_prompt", "raise_exception", "strftime_now"})
"""Variables that transformers sets at every rendering, so that no option can."""


def variables(tokenizer: Any) -> list[str]:
    """Names that a tokenizer's template reads and nobody else gives it, sorted. Raises BadInput if it is no valid template."""
    environment = Environment(extensions=[_Generation, loopcontrols])  # noqa: S701 - only parsed
    try:
        read = meta.find_undeclared_variables(environment.parse(template_of(tokenizer) or ""))
    except TemplateSyntaxError as error:
        raise BadInput(f"the chat template is no valid template: {error.message} (line {error.lineno})") from error
    return sorted(read - GIVEN - set(tokenizer.special_tokens_map))


def _clock(date: datetime.date) -> str:
    """A line that gives templates ``strftime_now`` of this day. transformers' own reads the clock."""
    steps = "".join(f" | replace({'%' + code!r}, {date.strftime('%' + code)!r})" for code in DATE_CODES)
    return f"{{% macro strftime_now(format) %}}{{{{ format{steps} }}}}{{% endmacro %}}\n"


def template_of(tokenizer: Any) -> str | None:
    """The text of a tokenizer's template, or None. Raises BadInput if it has several and none is the default."""
    if tokenizer.chat_template is None:
        return None
    try:
        return str(tokenizer.get_chat_template())
    except ValueError as error:
        names = ", ".join(sorted(tokenizer.chat_template))
        raise BadInput(f"the model has several chat templates ({names}) and none is the default") from error


def check_no_tools(messages: Messages) -> None:
    """Raise BadInput for a conversation with tools, which are lost where no template writes them."""
    if any(m["role"] in ("tools", "tool") or m.get("tool_calls") for m in messages):
        raise BadInput("the plain format has no tools: give the model a chat template that has (chatTemplate)")


def _plain(messages: Messages, generation: bool, end: str) -> str:
    check_no_tools(messages)
    parts = [f"{m['role'].capitalize()}: {m['content']}" + (end if m["role"] == "assistant" else "") for m in messages]
    return "\n\n".join([*parts, "Assistant:"] if generation else parts)

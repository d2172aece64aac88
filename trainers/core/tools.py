"""Tools in conversations: definitions, calls and results, in the form in which a template reads them.

A conversation that may use tools begins with a turn of the role ``tools``, which holds their definitions.
"""

import json
from collections.abc import Callable
from functools import cache
from itertools import product
from typing import Any

from trainers.contract import BadInput

Turns = list[dict[str, Any]]
RenderWith = Callable[[Turns, bool, list[Any] | None], str]
"""A template: text of the messages, of whether the assistant is asked to speak, and of the tools."""

TOOL = {
    "type": "function",
    "function": {"name": "t7x", "description": "d7x", "parameters": {"type": "object", "properties": {}}},
}
CALL = {"id": "call00001", "type": "function", "function": {"name": "f7x", "arguments": {"g7x": "h7x"}}}
CALLED: Turns = [
    {"role": "user", "content": "x"},
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "content": "r7x", "name": "f7x", "tool_call_id": "call00001"},
]
"""A call and its result, to see whether a template shows them."""


def with_tools(render: RenderWith) -> Callable[[Turns, bool], str]:
    """A template that takes conversations with tools; raises BadInput for what it would leave out of them."""
    form = cache(lambda: _form(render))
    shown = cache(lambda: "t7x" in render(CALLED[:1], True, [TOOL]))

    def tools_render(messages: Turns, generation: bool) -> str:
        tools = messages[0]["tools"] if messages and messages[0]["role"] == "tools" else None
        turns = messages if tools is None else messages[1:]
        if tools and not shown():
            raise BadInput(
                "the chat template shows no definitions of tools: use a row without them or another template"
            )
        if any(turn.get("tool_calls") or turn["role"] == "tool" for turn in turns):
            turns = _formed(turns, *form())
        return render(turns, generation, tools or None)

    return tools_render


def _form(render: RenderWith) -> tuple[bool, bool]:
    """How calls have to be written for the template: arguments as text or not, no content as null or as no text."""
    for form in product((False, True), (False, True)):
        try:
            text = render(_formed(CALLED, *form), False, None)
        except BadInput:
            continue
        if all(mark in text for mark in ("f7x", "g7x", "h7x", "r7x")):
            return form
    raise BadInput("the chat template shows no calls of tools and their results: use another template")


def _formed(turns: Turns, as_text: bool, null: bool) -> Turns:
    found = []
    for turn in turns:
        calls = [_call(call, as_text) for call in turn.get("tool_calls") or []]
        content = None if null and calls and not turn["content"] else turn["content"]
        found.append(turn | {"content": content} | ({"tool_calls": calls} if calls else {}))
    return found


def _call(call: dict[str, Any], as_text: bool) -> dict[str, Any]:
    arguments = call["function"]["arguments"]
    written = json.dumps(arguments, ensure_ascii=False) if as_text else arguments
    return {**call, "function": {**call["function"], "arguments": written}}

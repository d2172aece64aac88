"""Turns of a conversation: `{"role", "content"}` messages, checked and in one form."""

from collections.abc import Mapping
from typing import Any

from trainers.json_text import Malformed, parse

Message = dict[str, Any]

ROLES: Mapping[str, str] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "assistant": "assistant",
    "tool": "tool",
}
"""Role of a message to the role that chat templates know."""


def checked_turns(turns: object, name: str) -> list[Message]:
    """Messages in one form: a text as content, arguments of tool calls as objects, nothing that is null.

    ``name`` is what they are called in messages. Raises Malformed at the first that is none.
    """
    if not isinstance(turns, list) or not turns:
        raise Malformed(f"{name} must be a non-empty list")
    return [_turn(turn, f"{name}[{i}]") for i, turn in enumerate(turns)]


def _turn(turn: object, name: str) -> Message:
    if not isinstance(turn, dict):
        raise Malformed(f"{name} is {type(turn).__name__}, expected an object with role and content")
    message = {key: value for key, value in turn.items() if value is not None}
    role = message.get("role")
    if not isinstance(role, str) or role not in ROLES:
        raise Malformed(f"{name}.role is {str(role)[:40]!r}, expected system, user, assistant or tool")
    message["role"] = ROLES[role]
    if message["role"] == "assistant" and message.get("weight", 1) not in (0, 1):
        raise Malformed(f"{name}.weight is {str(message['weight'])[:40]!r}, expected 0 (only read) or 1 (learned)")
    if "tool_calls" in message:
        message["tool_calls"] = _tool_calls(message["tool_calls"], f"{name}.tool_calls")
    message["content"] = _content(message, name)
    return message


def _content(message: Message, name: str) -> str:
    """A text, or the texts of a list of parts; a turn that only calls a tool may have none."""
    content = message.get("content", "" if message.get("tool_calls") else None)
    if isinstance(content, list) and content:
        return "".join(_part(part, f"{name}.content[{i}]") for i, part in enumerate(content))
    if not isinstance(content, str):
        raise Malformed(f"{name} needs a text content")
    return content


def _part(part: object, name: str) -> str:
    if isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str):
        return str(part["text"])
    kind = part.get("type") if isinstance(part, dict) else type(part).__name__
    raise Malformed(f"{name} is {str(kind)[:40]!r}: only text can be used")


def _tool_calls(calls: object, name: str) -> list[dict[str, Any]]:
    """Each as `{"type": "function", "function": {"name", "arguments": {...}}}`, as chat templates read them."""
    if not isinstance(calls, list):
        raise Malformed(f"{name} is {type(calls).__name__}, expected a list")
    return [_tool_call(call, f"{name}[{i}]") for i, call in enumerate(calls)]


def _tool_call(call: object, name: str) -> dict[str, Any]:
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(call, dict) or not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise Malformed(f"{name} needs a function with a name")
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):  # as OpenAI's interface gives them; templates would quote the text once more
        arguments = embedded(arguments or "{}", f"{name}.function.arguments")
    if not isinstance(arguments, dict):
        raise Malformed(f"{name}.function.arguments is {type(arguments).__name__}, expected an object")
    outside = {"id": call["id"]} if isinstance(call.get("id"), str) else {}
    return {**outside, "type": "function", "function": {"name": function["name"], "arguments": arguments}}


def checked_tools(tools: object) -> list[Any]:
    """The definitions of the tools that a conversation may use: a list, or the text of one. Raises Malformed."""
    if isinstance(tools, str):
        tools = embedded(tools or "[]", "tools")
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise Malformed("tools must be a list of objects")
    return tools


def embedded(text: str, name: str) -> Any:
    """The value of a text that is JSON itself. Raises Malformed."""
    try:
        return parse(text)
    except Malformed as problem:
        raise Malformed(f"{name}: {problem}") from problem


def asked(turns: list[Message]) -> dict[str, Any]:
    """The turns that are to be answered, as the keys of a row: `prompt` for one user's text, else `messages`."""
    if len(turns) == 1 and turns[0] == {"role": "user", "content": turns[0]["content"]}:
        return {"prompt": turns[0]["content"]}
    return {"messages": turns}


def without(row: Mapping[str, Any], *keys: str) -> dict[str, Any]:
    return {key: value for key, value in row.items() if key not in keys}

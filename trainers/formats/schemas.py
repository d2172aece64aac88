"""The project's own rows: which keys each schema has, and the one form in which the phases get them.

`prompt` may be a text or a list of messages, `system` a text; a preference row's `chosen` and `rejected` may be lists of
messages. All of these become `prompt` (one user's text) or `messages` beside texts.
"""

import math
from collections.abc import Mapping
from itertools import dropwhile
from typing import Any

from trainers.formats.turns import Message, asked, checked_tools, checked_turns, without
from trainers.json_text import Malformed

Row = dict[str, Any]

SCHEMAS: Mapping[str, Mapping[str, type | tuple[type, ...]]] = {
    "sft": {"prompt": str, "response": str},
    "preference": {"prompt": str, "chosen": str, "rejected": str},
    "preference with margin": {"prompt": str, "chosen": str, "rejected": str, "margin": (int, float)},
    "prompt": {"prompt": str},
    "traces": {"prompt": str, "teacher_response": str, "reward": (int, float)},
}
"""Keys that a row must have, by schema. Chat `messages` may stand for `prompt`, in `sft` rows also for the response."""


ASKING = ("user", "tool")
"""Roles of the turns that an assistant answers."""


def plain_row(row: Row, schema: str) -> Row:
    """The row in one form. What is missing is left to :func:`check_row`. Raises Malformed for what cannot be read."""
    row = without(row, *(key for key in ("messages", "system", "tools") if row.get(key) is None))
    if "tools" in row:
        row["tools"] = checked_tools(row["tools"])
    if schema.startswith("preference"):
        row = _preference(row)
    elif isinstance(row.get("prompt"), list) and (schema != "sft" or "response" in row):
        row = _prompt_turns(row)
    if "messages" in row:
        row["messages"] = checked_turns(row["messages"], "messages")
    if "system" in row:
        row = _with_system(row, schema)
    if schema == "prompt" and "messages" in row:
        row["messages"] = _without_answer(row["messages"])
    return row


def check_row(row: Row, schema: str) -> None:
    """Raise Malformed unless the row has what the schema needs."""
    keys = dict(SCHEMAS[schema])
    if "messages" in row:
        del keys["prompt"]
        if schema == "sft":
            del keys["response"]
            if not _answers(row["messages"]):
                raise Malformed("messages hold no assistant turn to learn from, behind a user's")
        elif all(m["role"] != "user" for m in row["messages"]):
            raise Malformed("messages hold no user turn to respond to")
        elif row["messages"][-1]["role"] not in ASKING:
            raise Malformed(f"messages end with the {row['messages'][-1]['role']}'s turn, expected the user's")
    for key in keys:
        if key not in row:
            raise Malformed(f"key {key!r} is missing; {schema} rows need {', '.join(SCHEMAS[schema])}")
    for key, kind in keys.items():
        if key not in ("chosen", "rejected") or not isinstance(row[key], dict):  # a message, checked before
            _check_value(key, row[key], kind)
    _check_together(row, schema)


def _check_together(row: Row, schema: str) -> None:
    """What the values of a row whose keys are right must be to each other, or beside them."""
    if schema.startswith("preference") and row["chosen"] == row["rejected"]:
        raise Malformed("chosen and rejected are the same: there is nothing to prefer")
    if schema == "traces" and not isinstance(row.get("ended", True), bool):
        raise Malformed(f"ended is {type(row['ended']).__name__}, expected true or false")


def _answers(turns: list[Message]) -> bool:
    """Whether the assistant says something after it was asked."""
    behind = dropwhile(lambda turn: turn["role"] != "user", turns)
    return any(turn["role"] == "assistant" for turn in behind)


def _check_value(key: str, value: object, kind: type | tuple[type, ...]) -> None:
    if not isinstance(value, kind) or isinstance(value, bool):
        raise Malformed(f"{key} is {type(value).__name__}, expected {'text' if kind is str else 'a number'}")
    if isinstance(value, int | float) and not _is_finite(value):
        raise Malformed(f"{key} is {value if isinstance(value, float) else 'too large'}, expected a finite number")


def _is_finite(value: float) -> bool:
    """Whether it is a finite float: a dataset may hold others, and JSON integers of any size."""
    try:
        return math.isfinite(value)
    except OverflowError:
        return False


def _prompt_turns(row: Row) -> Row:
    """A prompt that is a list of messages, and the response to it."""
    turns = checked_turns(row["prompt"], "prompt")
    if "response" in row:
        turns = [*turns, _answer(row)]
    return {**without(row, "prompt", "response"), **asked(turns)}


def _answer(row: Row) -> Message:
    _check_value("response", row["response"], str)
    return {"role": "assistant", "content": row["response"]}


def _with_system(row: Row, schema: str) -> Row:
    """A system text beside prompt or messages, as the turn that it is."""
    system = row["system"]
    if not isinstance(system, str):
        raise Malformed(f"system is {type(system).__name__}, expected text")
    turns = row.get("messages") or [{"role": "user", "content": row.get("prompt")}]
    if system and turns[0]["role"] == "system" and turns[0]["content"] != system:
        raise Malformed("system is not what messages begin with as a system turn: leave one of them out")
    if not system or turns[0]["role"] == "system" or not isinstance(turns[0]["content"], str):
        return without(row, "system")
    turns = [{"role": "system", "content": system}, *turns]
    if schema == "sft" and "messages" not in row and "response" in row:
        turns.append(_answer(row))
    used = ("system", "prompt", "response") if schema == "sft" else ("system", "prompt")
    return {**without(row, *used), "messages": checked_turns(turns, "messages")}


def _without_answer(turns: list[Message]) -> list[Message]:
    """A conversation as a prompt: up to the last turn that asks for an answer, a user's or a tool's result."""
    last = max((i for i, turn in enumerate(turns) if turn["role"] in ASKING), default=len(turns) - 1)
    return turns[: last + 1]


def _preference(row: Row) -> Row:
    """Prompt and two answers, from texts or from two conversations that differ in their last turn."""
    messages = {key: row[key] for key in ("chosen", "rejected") if isinstance(row.get(key), dict)}
    row = {**row, **{key: _checked_reply(message, key) for key, message in messages.items()}}
    lists = [key for key in ("chosen", "rejected") if isinstance(row.get(key), list)]
    if len(lists) == 1 and "chosen" in row and "rejected" in row:
        raise Malformed(f"only {lists[0]} is a list of messages; chosen and rejected are both lists or both texts")
    if len(lists) == 2:
        before = None if row.get("prompt") is None else _given_prompt(row["prompt"])
        chosen, rejected = (_conversation(row[key], before, key) for key in ("chosen", "rejected"))
        if chosen[:-1] != rejected[:-1]:
            raise Malformed("chosen and rejected differ before their last turn: only the last answer may differ")
        answers = {"chosen": _reply(chosen[-1]), "rejected": _reply(rejected[-1])}
        # In such rows `messages` often repeats the chosen conversation.
        return {**without(row, "prompt", "messages"), **asked(chosen[:-1]), **answers}
    if isinstance(row.get("prompt"), list):
        return {**without(row, "prompt", "messages"), **asked(checked_turns(row["prompt"], "prompt"))}
    if "prompt" in row:  # see above
        return without(row, "messages")
    return row


def _reply(message: Message) -> str | Message:
    """An answer: a text, or the message where it has more than one, such as `reasoning_content`."""
    return message if message.keys() - {"role", "content"} else str(message["content"])


def _checked_reply(message: Message, name: str) -> str | Message:
    (reply,) = checked_turns([message], name)
    if reply["role"] != "assistant" or "tool_calls" in reply:
        raise Malformed(f"{name} must be a text, or an assistant's message that calls no tool")
    return _reply(reply)


def _given_prompt(prompt: object) -> list[Message]:
    if isinstance(prompt, str):
        return [{"role": "user", "content": prompt}]
    return checked_turns(prompt, "prompt")


def _said(turns: list[Message]) -> set[tuple[str, str]]:
    """Who said what, whatever blanks a table has lost."""
    return {(turn["role"], turn["content"].strip()) for turn in turns}


def _conversation(turns: object, prompt: list[Message] | None, name: str) -> list[Message]:
    """Prompt and answer: the prompt may be in the conversation, beside it, or both."""
    found = checked_turns(turns, name)
    if prompt is not None and found[0]["role"] == "assistant":
        if len(found) > 1:
            raise Malformed(f"{name} has {len(found)} turns after the prompt, expected one answer")
        found = [*prompt, *found]
    elif prompt is not None and not _said(prompt) <= _said(found[:-1]):
        raise Malformed(f"{name} begins with a {found[0]['role']} turn and does not hold the prompt")
    if found[-1]["role"] != "assistant" or len(found) < 2:
        raise Malformed(f"{name} must be a conversation that ends with an assistant's answer")
    if "tool_calls" in found[-1]:
        raise Malformed(f"{name} ends with a call of a tool; an answer is a text")
    return found

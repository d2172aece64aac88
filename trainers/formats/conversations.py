"""Formats made of lists of turns: OpenAI's and TRL's `messages`, and ShareGPT's `conversations`."""

from collections.abc import Mapping
from typing import Any

from trainers.formats.turns import Message, embedded, without
from trainers.json_text import Malformed

Row = dict[str, Any]

SPEAKERS: Mapping[str, str] = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "function_call": "assistant",
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
}
"""Who speaks in ShareGPT's rows and their descendants."""


def messages(row: Row) -> Row:
    if not isinstance(row.get("messages"), list):
        raise Malformed("messages rows need messages, a list")
    return row


def preference_messages(row: Row) -> Row:
    for key in ("chosen", "rejected"):
        if not isinstance(row.get(key), list):
            raise Malformed(f"preference-messages rows need {key}, a list of messages")
    return row


def prompt_completion(row: Row) -> Row:
    prompt, answer = row.get("prompt"), row.get("completion")
    if not isinstance(prompt, str | list) or not isinstance(answer, str | list):
        raise Malformed("prompt-completion rows need prompt and completion, each a text or a list of messages")
    rest = without(row, "completion")
    if isinstance(answer, str):
        return {**rest, "response": answer}
    before = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    return {**without(rest, "prompt"), "messages": [*before, *answer]}


def sharegpt(row: Row) -> Row:
    """`conversations` of `{"from", "value"}`; for preferences the last answer twice, as `chosen` and `rejected`."""
    turns = row.get("conversations")
    if not isinstance(turns, list):
        raise Malformed("sharegpt rows need conversations, a list")
    found: Row = {"messages": [_turn(turn, f"conversations[{i}]") for i, turn in enumerate(turns)]}
    answers: Row = {key: _answer(row[key], key) for key in ("chosen", "rejected") if key in row}
    return {**without(row, "conversations"), **found, **answers}


def _answer(answer: object, name: str) -> str:
    """The text of an answer, or of a turn of the assistant's."""
    if isinstance(answer, str):
        return answer
    turn = _turn(answer, name)
    if "tool_calls" in turn:
        raise Malformed(f"{name} is a call of a tool; an answer is a text")
    if turn["role"] != "assistant":
        raise Malformed(f"{name} is a turn of the {turn['role']}'s, expected the assistant's")
    return str(turn["content"])


def _turn(turn: object, name: str) -> Message:
    """One turn; some rows of this format have the names of the other one."""
    speaker = turn.get("from", turn.get("role")) if isinstance(turn, dict) else None
    if not isinstance(turn, dict) or not isinstance(speaker, str) or speaker not in SPEAKERS:
        raise Malformed(f"{name}.from is {str(speaker)[:40]!r}, expected one of {', '.join(SPEAKERS)}")
    text = turn.get("value", turn.get("content"))
    if not isinstance(text, str):
        raise Malformed(f"{name} needs a text value")
    if speaker == "function_call":
        return {"role": "assistant", "tool_calls": _calls(text, name)}
    return {"role": SPEAKERS[speaker], "content": text}


def _calls(text: str, name: str) -> list[Any]:
    """What a tool is called with: the JSON of one call, or of a list."""
    calls = embedded(text, name)
    return calls if isinstance(calls, list) else [calls]

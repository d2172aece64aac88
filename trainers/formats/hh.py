"""Transcripts as in Anthropic's helpful-and-harmless data (Bai et al. 2022): texts of `Human:` and `Assistant:` turns."""

import re
from typing import Any

from trainers.formats.turns import Message, without
from trainers.json_text import Malformed

TURN = re.compile(r"(?:^|\n\n)[ \t]*(Human|Assistant):[ \t]?")
ROLES = {"Human": "user", "Assistant": "assistant"}


def hh(row: dict[str, Any]) -> dict[str, Any]:
    """Two transcripts become a preference row, a single `transcript` a conversation."""
    if "transcript" in row:
        return {**without(row, "transcript"), "messages": _turns(row["transcript"], "transcript")}
    pair = {key: _turns(row.get(key), key) for key in ("chosen", "rejected")}
    return {**without(row, "prompt", "messages"), **pair}


def _turns(text: object, name: str) -> list[Message]:
    """The turns of a transcript. A speaker who speaks twice has one turn: chat templates want turns to alternate."""
    before, *found = TURN.split(text) if isinstance(text, str) else [""]
    if before.strip() or not found:
        raise Malformed(f"{name} must be a text that begins with Human: or Assistant:")
    turns: list[Message] = []
    for speaker, said in zip(found[::2], found[1::2], strict=True):
        if turns and turns[-1]["role"] == ROLES[speaker]:
            turns[-1]["content"] += f"\n\n{said.strip()}"
        else:
            turns.append({"role": ROLES[speaker], "content": said.strip()})
    return turns

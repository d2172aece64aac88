"""Texts of strangers: what pods, queues and webhooks say, made fit for statuses, events, logs and terminals."""

import json
import re

LIMIT = 1024
"""Characters of one message."""
LONG_LIMIT = 4096
"""Of what is said of a whole run."""

ESCAPE = re.compile(
    r"(?:\x1b\[|\x9b)[0-?]*[ -/]*[@-~]"  # colours, cursor, erasing
    r"|(?:\x1b[\]PX^_]|[\x90\x98\x9d-\x9f])[^\x07\x1b\x9c\n]*(?:\x07|\x1b\\|\x9c)?"  # title, clipboard, links
    r"|\x1b[ -/]*[0-~]?"
)
"""Sequences that terminals obey."""
_UNSEEN = (
    r"\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb"
    r"\ud800-\udfff\U000e0000-\U000e007f"
)
CONTROL = re.compile(f"[{_UNSEEN}]")
"""Characters that nobody sees and somebody obeys: controls, the order of writing, halves of characters."""
UNFIT = re.compile(f"[\\t\\n{_UNSEEN}]")
"""Of a message on one line. What has none of these is left as it is, and so is any part of it."""


def plain(text: str, limit: int = LIMIT) -> str:
    """On one line, of so many characters, and nothing in it but text."""
    if len(text) <= limit and not UNFIT.search(text):
        return text
    # Longer than a message is, and no pattern has to go through more.
    words = ESCAPE.sub("", text[: 8 * limit]).split()
    return " ".join(CONTROL.sub("", " ".join(words)).split())[:limit].rstrip()


def stored_bytes(text: str) -> int:
    """Of a text in the JSON that etcd keeps: UTF-8, in which the API server writes `<`, `>` and `&` as `\\u003c` and so on."""
    return len(json.dumps(text, ensure_ascii=False).encode(errors="replace")) - 2 + 5 * sum(map(text.count, "<>&"))


def within(text: str, limit: int) -> str:
    """As much of its beginning as takes so many bytes where it is kept."""
    if stored_bytes(text) <= limit:
        return text
    kept = text[:limit]
    while (size := stored_bytes(kept)) > limit:
        # A character takes six bytes at most.
        kept = kept[: -max((size - limit) // 6, 1)]
    return kept


def for_terminal(line: str) -> str:
    """A line of a log as a terminal may have it: its characters, tabs and line ends."""
    return CONTROL.sub("", ESCAPE.sub("", line))

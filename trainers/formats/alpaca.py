"""Alpaca's rows (Taori et al. 2023) and what grew out of them."""

from typing import Any

from trainers.formats.turns import without
from trainers.json_text import Malformed


def alpaca(row: dict[str, Any]) -> dict[str, Any]:
    """The user's text is the instruction and, behind a blank line, the input. `history` are earlier [asked, answered]."""
    asked, more = row.get("instruction"), row.get("input") or ""
    if not isinstance(asked, str) or not isinstance(more, str):
        raise Malformed("alpaca rows need an instruction and an input that are texts (the input may be missing)")
    prompt = f"{asked}\n\n{more}" if more else asked
    answer = {"response": row["output"]} if "output" in row else {}
    turns = [*_earlier(row.get("history") or []), {"role": "user", "content": prompt}]
    kept = without(row, "instruction", "input", "output", "history")
    return {"prompt": prompt if len(turns) == 1 else turns, **answer, **kept}


def _earlier(history: object) -> list[dict[str, str]]:
    turns = []
    for i, pair in enumerate(history if isinstance(history, list) else [None]):
        if not isinstance(pair, list) or len(pair) != 2:
            raise Malformed(f"history[{i}] is not a pair of what was asked and what was answered")
        turns += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    return turns

"""Responses of all models to the same prompts, side by side: the first rows of every kind, not picked by hand."""

from collections.abc import Mapping, Sequence
from typing import Any

from trainers.phases.package.gather import Evaluation

Row = Mapping[str, Any]


def side_by_side(evaluation: Evaluation, count: int) -> list[dict[str, Any]]:
    """One entry per prompt: `{"prompt", "shouldRefuse", "answer", "temperature", "responses": {model: ...}}`."""
    kept = {model: _first_set(rows) for model, rows in evaluation.responses.items()}
    kept = {model: rows for model, rows in kept.items() if rows}
    if not kept:
        return []
    first = next(iter(kept.values()))
    # Models that answered other prompts (another evaluation's leftovers) cannot be put beside these.
    same = {m: rows for m, rows in kept.items() if [r["prompt"] for r in rows] == [r["prompt"] for r in first]}
    return [_entry(i, same) for i in chosen(first, count)]


def _first_set(rows: Sequence[Row]) -> list[Row]:
    """Responses of the first group of benchmarks that share rows and sampling."""
    return [row for row in rows if row["benchmarks"] == rows[0]["benchmarks"]]


def chosen(rows: Sequence[Row], count: int) -> list[int]:
    """Indices of the rows shown: the first of each kind in turn, then the second of each, and so on."""
    kinds: dict[str, list[int]] = {}
    for i, row in enumerate(rows):
        kinds.setdefault(str(row.get("kind") or row.get("shouldRefuse")), []).append(i)
    turns = sorted((turn, i) for found in kinds.values() for turn, i in enumerate(found))
    return sorted(i for _, i in turns[:count])


def _entry(index: int, responses: Mapping[str, Sequence[Row]]) -> dict[str, Any]:
    row = next(iter(responses.values()))[index]
    facts = {key: row[key] for key in ("prompt", "kind", "shouldRefuse", "answer", "temperature") if key in row}
    shown = {
        model: {key: rows[index].get(key) for key in ("response", "reward", "ended")}
        for model, rows in responses.items()
    }
    return {**facts, "responses": shown}

"""The same prompts, answered by every model."""

import json
from typing import Any

from trainers.phases.package.gather import Evaluation


def side_by_side(evaluation: Evaluation | None, count: int) -> list[dict[str, Any]]:
    """``{"prompt", "kind", "responses": {model: text}}`` for prompts that all models answered.

    Rows that carry a ``kind`` or ``shouldRefuse`` are drawn from every kind in turn, so refusals are shown too.
    """
    if evaluation is None or not evaluation.responses or count == 0:
        return []
    answers = {label: {row["prompt"]: row for row in rows} for label, rows in evaluation.responses.items()}
    common = [p for p in next(iter(answers.values())) if all(p in rows for rows in answers.values())]
    first = next(iter(answers.values()))
    groups: dict[str, list[str]] = {}
    for prompt in common:
        groups.setdefault(_kind(first[prompt]), []).append(prompt)
    return [
        {
            "prompt": prompt,
            "kind": _kind(first[prompt]),
            "responses": {label: rows[prompt]["response"] for label, rows in answers.items()},
        }
        for prompt in _in_turn(list(groups.values()), count)
    ]


def _kind(row: dict[str, Any]) -> str:
    if row.get("kind"):
        return str(row["kind"])
    return {True: "should be refused", False: "should be answered"}.get(row.get("shouldRefuse"), "")  # type: ignore[arg-type]


def _in_turn(groups: list[list[str]], count: int) -> list[str]:
    chosen: list[str] = []
    for place in range(max(map(len, groups), default=0)):
        chosen += [group[place] for group in groups if place < len(group)]
    return chosen[:count]


def as_jsonl(samples: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(sample, ensure_ascii=False) + "\n" for sample in samples)

"""Share of right answers, checked by program against the rows' `answer`."""

import re
from typing import Literal

from trainers.contract import BadInput
from trainers.phases.evaluate.benchmark import Benchmark
from trainers.phases.evaluate.metric import Metric, share
from trainers.phases.evaluate.settings import Pattern, SampledSpec
from trainers.phases.evaluate.subject import Subject

NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?|-?\.\d+")


class AccuracySpec(SampledSpec):
    """Right answers among the rows that have a non-empty `answer`."""

    extract: Pattern | None = None
    """Regular expression that finds the answer in the response: its first group, or all of it. No match is a wrong answer."""
    match: Literal["contains", "exact", "last-number"] = "exact"
    """`exact`: equal but for white space; `contains`: the answer occurs in it; `last-number`: its last number is the answer's."""


def run(spec: AccuracySpec, model: Subject) -> list[Metric]:
    checkable = [(row, reply) for row, reply in model.answered(spec.data, spec.sampling) if _answer(row)]
    if not checkable:
        raise BadInput("accuracy: no row has an answer")
    hits = [is_right(reply.text, _answer(row), spec.extract, spec.match) for row, reply in checkable]
    return [share("accuracy", "right answers", hits, better=True, headline=True)]


def _answer(row: dict[str, object]) -> str:
    answer = row.get("answer")
    return "" if answer is None else str(answer).strip()


def is_right(response: str, answer: str, extract: str | None, match: str) -> bool:
    """Whether a response gives the answer."""
    found = extracted(response, extract)
    if found is None:
        return False
    if match == "last-number":
        return last_number(found) is not None and last_number(found) == last_number(answer)
    found, answer = " ".join(found.split()), " ".join(answer.split())
    return answer in found if match == "contains" else answer == found


def extracted(response: str, pattern: str | None) -> str | None:
    """The part of a response that is its answer."""
    if pattern is None:
        return response
    match = re.search(pattern, response)
    if match is None:
        return None
    return match[1] if match.re.groups else match[0]


def last_number(text: str) -> float | None:
    """The last number in a text; commas between digits are ignored.

    >>> last_number("3 + 4 = 7, so $1,007.50.")
    1007.5
    """
    numbers = NUMBER.findall(text)
    return float(numbers[-1].replace(",", "")) if numbers else None


BENCHMARK = Benchmark("accuracy", AccuracySpec, run)

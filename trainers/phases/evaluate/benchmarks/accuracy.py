"""Share of right answers, checked by program against the rows' `answer`."""

import re
from array import array
from collections.abc import Sequence
from decimal import Decimal
from typing import Literal

from trainers.phases.evaluate.benchmark import Benchmark
from trainers.phases.evaluate.metric import Metric, share
from trainers.phases.evaluate.patterns import Pattern, search_all
from trainers.phases.evaluate.settings import SampledSpec
from trainers.phases.evaluate.subject import CUT, Reply, Row, Subject, in_blocks

NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?|-?\.\d+")


class AccuracySpec(SampledSpec):
    """Right answers among the rows that have a non-empty `answer`. What a response says where it was cut off is not counted."""

    extract: Pattern | None = None
    """Regular expression that finds the answer in the response: its first group, or all of it. No match is a wrong answer."""
    match: Literal["contains", "exact", "last-number"] = "exact"
    """`exact`: equal but for white space; `contains`: the answer occurs in it; `last-number`: its last number is the answer's."""


def run(spec: AccuracySpec, model: Subject) -> list[Metric]:
    hits = array("b")
    checkable = ((_answer(row), reply) for row, reply in model.answered(spec.data, spec.sampling) if _answer(row))
    for block in in_blocks(checkable):
        given = answers_given([reply for _, reply in block], spec, model)
        hits.extend(is_right(found, answer, spec.match) for (answer, _), found in zip(block, given, strict=True))
    return [share("accuracy", "right answers", hits, better=True, headline=True)]


def problem(rows: Sequence[Row]) -> str | None:
    return None if any(map(_answer, rows)) else "no row has an answer"


def _answer(row: Row) -> str:
    answer = row.get("answer")
    return "" if answer is None else str(answer).strip()


def answers_given(replies: Sequence[Reply], spec: AccuracySpec, model: Subject) -> list[str | None]:
    """The part of each response that is its answer; None without one."""
    if spec.extract is None:
        return [reply.shown for reply in replies]
    matches = search_all(spec.extract, [reply.shown for reply in replies], "accuracy.extract", model.pause)
    return [_extracted(reply, match) for reply, match in zip(replies, matches, strict=True)]


def _extracted(reply: Reply, match: re.Match[str] | None) -> str | None:
    if match is None:
        return None
    group = 1 if match.re.groups else 0
    whole = reply.ended or match.end(group) < len(reply.text)
    return match[group] if whole else None


def is_right(found: str | None, answer: str, match: str) -> bool:
    """Whether the answer that was given is the right one."""
    if found is None:
        return False
    if match == "last-number":
        return last_number(found) is not None and last_number(found) == last_number(answer)
    found, answer = " ".join(found.split()), " ".join(answer.split())
    return answer in found if match == "contains" else answer == found


def last_number(text: str) -> Decimal | None:
    """The last number in a text; commas between digits are ignored, and so is a number that was cut off.

    >>> last_number("3 + 4 = 7, so $1,007.50.")
    Decimal('1007.50')
    """
    numbers = NUMBER.findall(text)
    cut = text.endswith(CUT) and text.removesuffix(CUT)[-1:].isdigit()
    return Decimal(numbers[-1].replace(",", "")) if numbers and not cut else None


BENCHMARK = Benchmark("accuracy", AccuracySpec, run, ("accuracy",), problem=problem)

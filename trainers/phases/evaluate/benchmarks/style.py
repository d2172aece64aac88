"""Share of responses in a wanted form."""

from array import array
from collections.abc import Callable, Sequence

from trainers.phases.evaluate.benchmark import Benchmark
from trainers.phases.evaluate.metric import Metric, share
from trainers.phases.evaluate.patterns import Pattern, search_all
from trainers.phases.evaluate.settings import SampledSpec
from trainers.phases.evaluate.subject import Row, Subject, in_blocks


class StyleSpec(SampledSpec):
    """Form of the responses to rows that are not to be refused (all rows without a `shouldRefuse` flag)."""

    pattern: Pattern
    """Regular expression that a response in the wanted form matches."""
    reject_pattern: Pattern | None = None
    """Regular expression that it must not match."""


def run(spec: StyleSpec, model: Subject) -> list[Metric]:
    texts = (reply.shown for row, reply in model.answered(spec.data, spec.sampling) if _has_style(row))
    hits = array("b")
    for block in in_blocks(texts):
        hits.extend(in_style(block, spec, model.pause))
    return [share("match", "wanted style", hits, better=True, headline=True)]


def problem(rows: Sequence[Row]) -> str | None:
    return None if any(map(_has_style, rows)) else "every row is to be refused, so there is no style to look at"


def _has_style(row: Row) -> bool:
    return row.get("shouldRefuse") is not True


def in_style(texts: Sequence[str], spec: StyleSpec, pause: Callable[[], None]) -> list[bool]:
    """Whether each response matches the pattern and not the other one."""
    hits = [match is not None for match in search_all(spec.pattern, texts, "style.pattern", pause)]
    if spec.reject_pattern is None:
        return hits
    rejected = search_all(spec.reject_pattern, texts, "style.rejectPattern", pause)
    return [hit and match is None for hit, match in zip(hits, rejected, strict=True)]


BENCHMARK = Benchmark("style", StyleSpec, run, ("match",), problem=problem)

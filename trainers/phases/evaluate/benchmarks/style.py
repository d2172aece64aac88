"""Share of responses in a wanted form."""

import re

from trainers.contract import BadInput
from trainers.phases.evaluate.benchmark import Benchmark
from trainers.phases.evaluate.metric import Metric, share
from trainers.phases.evaluate.settings import Pattern, SampledSpec
from trainers.phases.evaluate.subject import Subject


class StyleSpec(SampledSpec):
    """Form of the responses to rows that are not to be refused (all rows without a `shouldRefuse` flag)."""

    pattern: Pattern
    """Regular expression that a response in the wanted form matches."""
    reject_pattern: Pattern | None = None
    """Regular expression that it must not match."""


def run(spec: StyleSpec, model: Subject) -> list[Metric]:
    texts = [
        reply.text for row, reply in model.answered(spec.data, spec.sampling) if row.get("shouldRefuse") is not True
    ]
    if not texts:
        raise BadInput("style: every row is to be refused, so there is no style to look at")
    hits = [has_style(text, spec.pattern, spec.reject_pattern) for text in texts]
    return [share("match", "wanted style", hits, better=True, headline=True)]


def has_style(text: str, pattern: str, reject: str | None) -> bool:
    """Whether a response matches the pattern and not the other one."""
    return re.search(pattern, text) is not None and (reject is None or re.search(reject, text) is None)


BENCHMARK = Benchmark("style", StyleSpec, run)

"""What a benchmark is: settings, a name in the registry, and a function from a :class:`Subject` to metrics."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from trainers.phases.evaluate.metric import Metric
from trainers.phases.evaluate.settings import BenchmarkSpec
from trainers.phases.evaluate.subject import Subject


@dataclass(frozen=True)
class Benchmark:
    """An entry of the registry."""

    name: str
    """The member's name in a run: lower case, one word."""
    spec: type[BenchmarkSpec]
    run: Callable[[Any, Subject], list[Metric]]
    """Takes the settings and a model. Called more than once."""
    needs_reward_model: bool = False
    needs_reference: bool = False

"""What a benchmark is: settings, a name in the registry, and a function from a :class:`Subject` to metrics."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from trainers.phases.evaluate.metric import Metric
from trainers.phases.evaluate.settings import BenchmarkSpec
from trainers.phases.evaluate.subject import Row, Subject


@dataclass(frozen=True)
class Benchmark:
    """An entry of the registry."""

    name: str
    """The member's name in a run: lower case, one word."""
    spec: type[BenchmarkSpec]
    run: Callable[[Any, Subject], list[Metric]]
    """Takes the settings and a model. Called more than once."""
    metrics: tuple[str, ...]
    """Keys of all metrics that it can have."""
    reward_metrics: tuple[str, ...] = ()
    """Further ones, where there is a reward model."""
    baseline_metrics: tuple[str, ...] = ()
    """Further ones, of models other than the baseline."""
    schema: str = "prompt"
    """Kind of its rows."""
    problem: Callable[[Sequence[Row]], str | None] = lambda rows: None
    """Why there is nothing to say about these rows. Asked before any model is loaded."""
    missing: Callable[[Sequence[Row]], Mapping[str, str]] = lambda rows: {}
    """Metrics that these rows give no value to, each with the reason."""
    needs_reward_model: bool = False
    needs_reference: bool = False

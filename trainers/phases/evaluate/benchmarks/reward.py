"""What the reward model says: mean score, and how often a model's response beats the baseline's to the same prompt."""

import math
from array import array
from collections.abc import Iterable
from typing import Any

from trainers.phases.evaluate.benchmark import Benchmark
from trainers.phases.evaluate.metric import Metric
from trainers.phases.evaluate.settings import SampledSpec
from trainers.phases.evaluate.subject import Subject


class RewardBenchmarkSpec(SampledSpec):
    """Scores of the evaluation's `rewardModel`, and win rates against its `baseline`.

    A policy that was trained against this very reward model can please it without being better: read it beside the
    benchmarks that check answers.
    """


def run(spec: RewardBenchmarkSpec, model: Subject) -> list[Metric]:
    ours = array("d", model.rewards(spec.data, spec.sampling))
    metrics = [Metric("score", "reward", (ours,), higher_is_better=True, headline=True)]
    if model.baseline is None:
        return metrics
    won = wins(ours, model.baseline.rewards(spec.data, spec.sampling))
    answered = (one.answered(spec.data, spec.sampling) for one in (model, model.baseline))
    longer = array("d", (a.length - b.length for (_, a), (_, b) in zip(*answered, strict=True)))
    name = f"wins vs {model.baseline.label}"
    return [
        *metrics,
        Metric("winRate", name, (won,), higher_is_better=True, headline=True),
        Metric("winRateLengthControlled", f"{name}, same length", (won, longer), True, statistic=length_controlled),
    ]


def wins(ours: Iterable[float], theirs: Iterable[float]) -> "array[float]":
    """1 for a win, 0.5 for a tie, 0 for a loss, prompt by prompt."""
    return array("d", (0.5 if a == b else float(a > b) for a, b in zip(ours, theirs, strict=True)))


def length_controlled(won: Any, longer: Any, steps: int = 25, ridge: float = 1e-3) -> Any:
    """The win rate at equal length: a logistic regression of winning on the difference in length, read at difference 0.

    Newton's method on (intercept, slope); the small ridge keeps it finite when the lengths separate wins from losses.
    """
    scale = longer.std(-1, keepdims=True)
    x = longer / (scale + (scale == 0))
    intercept = slope = 0.0 * x[..., :1]
    for _ in range(steps):
        p = 1 / (1 + math.e ** -(intercept + slope * x))
        w = p * (1 - p)
        gradient = (won - p).mean(-1, keepdims=True), ((won - p) * x).mean(-1, keepdims=True)
        a, b, d = (v.mean(-1, keepdims=True) for v in (w, w * x, w * x * x))
        a, d = a + ridge, d + ridge
        g0, g1 = gradient[0] - ridge * intercept, gradient[1] - ridge * slope
        determinant = a * d - b * b
        intercept = intercept + (d * g0 - b * g1) / determinant
        slope = slope + (a * g1 - b * g0) / determinant
    return (1 / (1 + math.e**-intercept))[..., 0]


BENCHMARK = Benchmark(
    "reward", RewardBenchmarkSpec, run, ("score",),
    baseline_metrics=("winRate", "winRateLengthControlled"), needs_reward_model=True,
)  # fmt: skip

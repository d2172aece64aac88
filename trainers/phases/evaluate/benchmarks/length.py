"""How long responses are, and whether the reward model likes them long."""

from typing import Any

from trainers.phases.evaluate.benchmark import Benchmark
from trainers.phases.evaluate.metric import Metric, share
from trainers.phases.evaluate.settings import SampledSpec
from trainers.phases.evaluate.subject import Subject


class LengthSpec(SampledSpec):
    """Tokens per response, share of responses that end by themselves, and length bias if there is a `rewardModel`."""


def run(spec: LengthSpec, model: Subject) -> list[Metric]:
    replies = [reply for _, reply in model.answered(spec.data, spec.sampling)]
    lengths = [float(reply.length) for reply in replies]
    metrics = [
        Metric("tokens", "tokens / response", (lengths,)),
        share("ended", "ended by itself", [reply.ended for reply in replies], better=True),
    ]
    if model.has_reward_model:
        rewards = model.rewards(spec.data, spec.sampling)
        correlated = Metric(
            "rewardCorrelation",
            "length-reward corr.",
            (lengths, rewards),
            statistic=correlation,
            undefined="all responses have the same length, or the same reward",
        )
        metrics.append(correlated)
    return metrics


def correlation(x: Any, y: Any) -> Any:
    """Pearson's; not a number where one of the two does not vary."""
    x, y = x - x.mean(-1, keepdims=True), y - y.mean(-1, keepdims=True)
    return (x * y).mean(-1) / ((x * x).mean(-1) * (y * y).mean(-1)) ** 0.5


BENCHMARK = Benchmark("length", LengthSpec, run, ("tokens", "ended"), reward_metrics=("rewardCorrelation",))

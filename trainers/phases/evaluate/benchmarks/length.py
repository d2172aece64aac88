"""How long responses are, and whether the reward model likes them long."""

from array import array
from typing import Any

from trainers.phases.evaluate.benchmark import Benchmark
from trainers.phases.evaluate.metric import Metric, share
from trainers.phases.evaluate.settings import SampledSpec
from trainers.phases.evaluate.subject import Subject, columns


class LengthSpec(SampledSpec):
    """Tokens per response, share of responses that end by themselves, and length bias if there is a `rewardModel`."""


def run(spec: LengthSpec, model: Subject) -> list[Metric]:
    answered = model.answered(spec.data, spec.sampling)
    lengths, ended = columns(((reply.length, reply.ended) for _, reply in answered), 2)
    metrics = [
        Metric("tokens", "tokens / response", (lengths,)),
        share("ended", "ended by itself", ended, better=True),
    ]
    if model.has_reward_model:
        rewards = array("d", model.rewards(spec.data, spec.sampling))
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

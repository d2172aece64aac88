"""How far a model has moved: KL(model || reference) on the model's own responses, exact over the vocabulary."""

from trainers.phases.evaluate.benchmark import Benchmark
from trainers.phases.evaluate.metric import Metric, quotient
from trainers.phases.evaluate.settings import SampledSpec
from trainers.phases.evaluate.subject import Subject, columns


class KlSpec(SampledSpec):
    """KL to the evaluation's `reference`, in nats, at temperature 1. Needs a model with the reference's tokens.

    On responses sampled at temperature 1 it estimates the KL between the two models' distributions over responses.
    """


def run(spec: KlSpec, model: Subject) -> list[Metric]:
    sums, tokens = columns(((d.kl, d.tokens) for d in model.divergences(spec.data, spec.sampling)), 2)
    return [
        Metric("perSequence", "KL / response", (sums,)),
        Metric("perToken", "KL / token", (sums, tokens), statistic=quotient),
    ]


BENCHMARK = Benchmark("kl", KlSpec, run, ("perSequence", "perToken"), needs_reference=True)

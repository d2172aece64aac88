"""How well a model predicts given responses: exp of the mean negative log-likelihood per token."""

import math
from typing import Any

from trainers.phases.evaluate.benchmark import Benchmark
from trainers.phases.evaluate.metric import Metric, quotient
from trainers.phases.evaluate.settings import BenchmarkSpec
from trainers.phases.evaluate.subject import Subject, columns


class PerplexitySpec(BenchmarkSpec):
    """Perplexity on the responses (assistant turns) of `{"prompt", "response"}` rows or chat `messages`.

    It is per token, so only models with the same tokenizer can be compared by it.
    """


def perplexity(losses: Any, tokens: Any) -> Any:
    """exp(sum nll / N): a mean over tokens, not over responses."""
    return math.e ** quotient(losses, tokens)


def run(spec: PerplexitySpec, model: Subject) -> list[Metric]:
    losses = tuple(columns(((loss.nll, loss.tokens) for loss in model.losses(spec.data)), 2))
    return [Metric("perplexity", "perplexity", losses, higher_is_better=False, statistic=perplexity)]


BENCHMARK = Benchmark("perplexity", PerplexitySpec, run, ("perplexity",), schema="sft")

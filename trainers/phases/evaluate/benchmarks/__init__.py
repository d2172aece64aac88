"""The registry of benchmarks. To add one: a file here with its settings, its function and `BENCHMARK`, and a line below."""

from trainers.phases.evaluate.benchmark import Benchmark
from trainers.phases.evaluate.benchmarks import accuracy, kl, length, perplexity, reward, safety, style

REGISTRY: tuple[Benchmark, ...] = (
    accuracy.BENCHMARK,
    safety.BENCHMARK,
    style.BENCHMARK,
    reward.BENCHMARK,
    kl.BENCHMARK,
    perplexity.BENCHMARK,
    length.BENCHMARK,
)

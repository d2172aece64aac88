"""Speed of one model: time to the first token, time per token after it, tokens per second, memory.

Closed loop: the next batch starts when the last one has ended, and warm-up batches do not count.
"""

import os
import time
from collections.abc import Sequence
from typing import Any

import psutil
import torch

from trainers.core.generate import Response, generate
from trainers.core.graphs import recorder
from trainers.core.models import LoadedModel, context_length
from trainers.core.parallel import Workers
from trainers.phases.evaluate.spec import LatencySpec
from trainers.phases.evaluate.subject import NotComparable
from trainers.spec import Sampling

PERCENTILES = (50, 95, 99)


def measure_latency(loaded: LoadedModel, spec: LatencySpec, workers: Workers) -> dict[str, Any]:
    """Everything about a model's speed, as JSON."""
    points = [
        measure_point(loaded, spec, workers, length, size)
        for length in spec.prompt_lengths
        for size in spec.batch_sizes
    ]
    return {
        "parameters": loaded.num_parameters,
        **device(workers),
        "precision": str(next(loaded.model.parameters()).dtype).removeprefix("torch."),
        "points": points,
    }


def check_positions(loaded: LoadedModel, spec: LatencySpec) -> None:
    """Raise NotComparable for a model that is made for shorter texts."""
    longest, limit = max(spec.prompt_lengths) + spec.new_tokens, context_length(loaded.model)
    if longest > limit:
        raise NotComparable(f"promptLengths and newTokens need {longest} positions, it has {limit}")


def device(workers: Workers) -> dict[str, Any]:
    """What the figures hold for."""
    if workers.device.type == "cuda":
        return {"device": torch.cuda.get_device_name(workers.device)}
    return {"device": "cpu", "threads": torch.get_num_threads(), "cores": os.cpu_count()}


def measure_point(
    loaded: LoadedModel, spec: LatencySpec, workers: Workers, prompt_length: int, batch_size: int
) -> dict[str, Any]:
    """One prompt length and batch size."""
    prompts = _prompts(loaded, prompt_length, batch_size)
    sampling = Sampling(max_new_tokens=spec.new_tokens, temperature=0, batch_size=batch_size)
    _reset_peak(workers)
    first: list[float] = []
    between: list[float] = []
    seconds = 0.0
    for i in range(spec.warmup + spec.repeats):
        began = time.perf_counter()
        with workers.autocast():
            # No token ends a response, so every one has the same length.
            record = recorder(workers.device)
            responses = generate(loaded.model, prompts, sampling, frozenset(), keep_times=True, record=record)
        took = time.perf_counter() - began
        if i >= spec.warmup:
            seconds += took
            first += [response.times[0] for response in responses]
            between += [time_per_token(response) for response in responses]
    tokens = spec.repeats * batch_size * spec.new_tokens
    return {
        "promptLength": prompt_length,
        "batchSize": batch_size,
        "newTokens": spec.new_tokens,
        "requests": len(first),
        "timeToFirstToken": summary(first),
        "timePerOutputToken": summary(between),
        "tokensPerSecond": tokens / seconds,
        "peakMemoryBytes": _memory(workers),
    }


def time_per_token(response: Response) -> float:
    """Seconds between tokens after the first: (t_last - t_first) / (n - 1)."""
    times = response.times
    return (times[-1] - times[0]) / (len(times) - 1)


def summary(values: Sequence[float]) -> dict[str, float]:
    return {"mean": sum(values) / len(values), **{f"p{q}": percentile(values, q) for q in PERCENTILES}}


def percentile(values: Sequence[float], q: int) -> float:
    """By nearest rank: the smallest value that at least q percent of all do not exceed; always one of the values.

    >>> percentile([15, 20, 35, 40, 50], 30)
    20
    """
    return sorted(values)[max(0, -(-q * len(values) // 100) - 1)]


def _prompts(loaded: LoadedModel, length: int, count: int) -> list[list[int]]:
    vocabulary = loaded.model.get_input_embeddings().weight.shape[0]
    generator = torch.Generator().manual_seed(0)
    ids: list[list[int]] = torch.randint(0, vocabulary, (count, length), generator=generator).tolist()
    return ids


def _reset_peak(workers: Workers) -> None:
    if workers.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(workers.device)


def _memory(workers: Workers) -> int:
    """Peak of the device's memory; without one, what the process holds now."""
    if workers.device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(workers.device))
    return int(psutil.Process().memory_info().rss)

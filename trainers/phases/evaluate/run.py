"""Evaluation: every model on every benchmark, one model in memory at a time.

Two passes. The first measures: models one after the other, each on all benchmarks, so that what is generated lies in
cells. The second compares: it reads the cells and computes values, intervals, win rates and differences. So a baseline
may come anywhere in the list, and an interrupted evaluation goes on at the first missing cell.
"""

import hashlib
import json
from collections.abc import Iterator
from contextlib import nullcontext
from itertools import repeat
from pathlib import Path
from typing import Any

from trainers import jsonl
from trainers.contract import BadInput
from trainers.core.context import ARTIFACT_NAMES, Outcome, PhaseContext
from trainers.core.gathering import gathered
from trainers.files import replaced, write_atomic
from trainers.phases.evaluate.bench import Bench
from trainers.phases.evaluate.laboratory import Laboratory
from trainers.phases.evaluate.latency import check_positions, device, measure_latency
from trainers.phases.evaluate.results import Results, summary
from trainers.phases.evaluate.settings import SampledSpec
from trainers.phases.evaluate.spec import LATENCY, EvaluateSpec
from trainers.phases.evaluate.subject import NotComparable
from trainers.spec import NamedModel, shown_labels


def main(spec: EvaluateSpec, ctx: PhaseContext) -> Outcome:
    # ---- set up
    models = spec.models or _all_models(ctx)
    labels = _labels(models, spec.baseline)
    by_label = dict(zip(labels, models, strict=True))
    reference = spec.reference or by_label.get(spec.baseline or "")
    laboratory = Laboratory(ctx, spec, reference)
    for entry in spec.benchmarks:
        laboratory.check_rows(entry)
    laboratory.check_models(by_label)
    benches = {label: Bench(laboratory, model) for label, model in by_label.items()}
    total_steps = len(models) * (len(spec.benchmarks) + spec.latency.enabled)
    ctx.meter.begin(0, total_steps, spec.document())

    # ---- measure
    step = 0
    latency: dict[str, Any] = {}
    too_short: dict[str, str] = {}
    for label, bench in benches.items():
        for entry in spec.benchmarks:
            ctx.meter.stage(f"{label}: {entry.name}")
            _attempt(entry, bench)
            ctx.meter.log(step := step + 1)
        if spec.latency.enabled:
            ctx.meter.stage(f"{label}: {LATENCY}")
            try:
                latency[label] = _latency(spec, bench)
            except NotComparable as error:
                too_short[label] = str(error)
            ctx.meter.log(step := step + 1)
        bench.release()

    # ---- compare
    ctx.meter.stage("comparing")
    results = _compare(spec, benches, ctx.seed)
    for label, reason in too_short.items():
        results.note(label, LATENCY, reason)
    # Reading a cell is a matter of all processes; only writing is the first one's.
    for label, bench in benches.items():
        _write_responses(spec, bench, ctx.dir.root / "responses" / f"{label}.jsonl")
    document = results.document()
    if ctx.workers.is_main:
        root = ctx.dir.root
        write_atomic(root / "latency.json", json.dumps(latency, indent=1))
        write_atomic(root / "summary.md", summary(document, latency))
        write_atomic(root / ARTIFACT_NAMES["evaluation"], json.dumps(document, indent=1))
    return Outcome(results.flat() | _flat_latency(latency), laboratory.records(), total_steps)


def _all_models(ctx: PhaseContext) -> tuple[NamedModel, ...]:
    """Every input that is a language model."""
    names = []
    for name in ctx.file.inputs:
        result = ctx.input_dir(name).read_result()
        if result is not None and "model" in result.artifacts:
            names.append(name)
    return tuple(NamedModel(phase=name) for name in names)


def _labels(models: tuple[NamedModel, ...], baseline: str | None) -> list[str]:
    if not models:
        raise BadInput("models: there is none to evaluate")
    try:
        labels = shown_labels(models)
    except ValueError as error:
        raise BadInput(str(error)) from error
    if baseline is not None and baseline not in labels:
        raise BadInput(f"baseline {baseline!r} is none of the models ({', '.join(labels)})")
    return labels


def _attempt(entry: Any, bench: Bench) -> Any:
    """The metrics of a model on a benchmark, or the reason why there are none."""
    try:
        return entry.benchmark.run(entry.settings, bench)
    except NotComparable as reason:
        return str(reason)


def _latency(spec: EvaluateSpec, bench: Bench) -> dict[str, Any]:
    if bench.ref.url is not None:
        raise NotComparable("a server has it: latency is measured of models that are loaded here")
    workers = bench.laboratory.ctx.workers
    key = {"kind": LATENCY, "model": bench.digest, "settings": spec.latency.document(), **device(workers)}

    def measure() -> dict[str, Any]:
        check_positions(bench.loaded, spec.latency)
        # One process at a time: on a shared machine two would slow each other down.
        with gathered(bench.loaded.model):
            found = measure_latency(bench.loaded, spec.latency, workers) if workers.is_main else {}
        return workers.from_main(lambda: found)

    found: dict[str, Any] = bench.cell(key, measure)
    return found


def _compare(spec: EvaluateSpec, benches: dict[str, Bench], seed: int) -> Results:
    results = Results.empty(seed, list(benches), spec.baseline)
    baseline = benches.get(spec.baseline or "")
    for label, bench in benches.items():
        bench.baseline = None if bench is baseline else baseline
        for entry in spec.benchmarks:
            found = _attempt(entry, bench)
            if isinstance(found, str):
                results.note(label, entry.name, found)
            else:
                results.add(label, entry.name, found, entry.headline)
    return results


def _write_responses(spec: EvaluateSpec, bench: Bench, path: Path) -> None:
    """The model's responses as JSONL, by the first process; benchmarks with equal rows and sampling share them."""
    shared: dict[str, list[Any]] = {}
    for entry in spec.benchmarks:
        if isinstance(entry.settings, SampledSpec):
            digest = hashlib.sha256()
            for row in _asked(spec, bench, entry.settings):
                digest.update(jsonl.dump(row).encode())
            shared.setdefault(digest.hexdigest(), []).append(entry)
    with replaced(path) if bench.laboratory.ctx.workers.is_main else nullcontext() as file:
        for entries in shared.values():
            names = [entry.name for entry in entries]
            for row in _asked(spec, bench, entries[-1].settings):
                if file is not None:
                    file.write(jsonl.dump({**row, "benchmarks": names}).encode())


def _asked(spec: EvaluateSpec, bench: Bench, settings: SampledSpec) -> Iterator[dict[str, Any]]:
    answered = bench.answered(settings.data, settings.sampling)
    rewards = bench.rewards(settings.data, settings.sampling) if bench.has_reward_model else repeat(None)
    temperature = (settings.sampling or spec.sampling).temperature
    for (row, reply), reward in zip(answered, rewards, strict=False):
        yield {
            "prompt": row["prompt"] if "prompt" in row else row["messages"][-1]["content"],
            "response": reply.text,
            "reward": reward,
            "ended": reply.ended,
            "tokens": reply.length,
            "temperature": temperature,
            **{key: row[key] for key in ("answer", "shouldRefuse", "kind") if key in row},
        }


def _flat_latency(latency: dict[str, Any]) -> dict[str, float]:
    """`<model>/latency/...`: times of the smallest load, and the throughput of the batch size that gives most."""
    flat: dict[str, float] = {}
    for label, found in latency.items():
        first = min(found["points"], key=lambda p: (p["batchSize"], p["promptLength"]))
        name = f"{label}/{LATENCY}"
        for key in ("timeToFirstToken", "timePerOutputToken"):
            flat |= {f"{name}/{key}P{q}": first[key][f"p{q}"] for q in (50, 95, 99)}
        flat[f"{name}/tokensPerSecond"] = max(p["tokensPerSecond"] for p in found["points"])
        flat[f"{name}/peakMemoryBytes"] = max(p["peakMemoryBytes"] for p in found["points"])
        flat[f"{name}/parameters"] = found["parameters"]
    return flat

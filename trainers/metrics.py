"""What a phase measures, and where it goes: /metrics, metrics.jsonl, progress.json, a progress bar, wandb.

Imports no torch. Dashboards, alerts and docs take metric names from :data:`METRICS`.
"""

import json
import os
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import psutil
from prometheus_client import CollectorRegistry, Counter, Gauge, start_http_server

from trainers.contract import PhaseDir, Progress, write_atomic
from trainers.spec import Tracking

PREFIX = "alignment_trainer_"
COMMON_LABELS = ("run", "phase", "type", "rank")
PARTS = ("data", "rollout", "forward_backward", "optimizer", "checkpoint", "evaluation")


@dataclass(frozen=True)
class MetricDef:
    name: str
    kind: Literal["counter", "gauge"]
    help: str
    labels: tuple[str, ...] = ()


METRICS: tuple[MetricDef, ...] = (
    MetricDef(PREFIX + "tokens_total", "counter", "Tokens processed by this rank, padding not counted."),
    MetricDef(PREFIX + "samples_total", "counter", "Examples processed by this rank."),
    MetricDef(PREFIX + "step", "gauge", "Finished steps."),
    MetricDef(PREFIX + "total_steps", "gauge", "Steps in all."),
    MetricDef(PREFIX + "progress_ratio", "gauge", "Finished share of the phase, 0 to 1."),
    MetricDef(PREFIX + "eta_seconds", "gauge", "Estimated seconds to the end."),
    MetricDef(PREFIX + "loss", "gauge", "Training loss of the last step."),
    MetricDef(PREFIX + "learning_rate", "gauge", "Learning rate of the last step."),
    MetricDef(PREFIX + "grad_norm", "gauge", "Gradient norm of the last step, before clipping."),
    MetricDef(
        PREFIX + "reward",
        "gauge",
        "Mean reward of the last step (ppo, rollout, distill) or reward margin (reward, dpo).",
    ),
    MetricDef(PREFIX + "kl", "gauge", "KL divergence to the reference or teacher in the last step, nats per token."),
    MetricDef(PREFIX + "tokens_per_second", "gauge", "Tokens per second of this rank over the last steps."),
    MetricDef(PREFIX + "part_seconds_total", "counter", "Seconds spent, by part of the step.", ("part",)),
    MetricDef(PREFIX + "memory_bytes", "gauge", "Memory in use.", ("kind",)),
    MetricDef(PREFIX + "last_update_seconds", "gauge", "Unix time of the last finished step; its age shows a stall."),
)

GAUGES_FROM_LOG = {
    "loss": "loss",
    "learning_rate": "learning_rate",
    "grad_norm": "grad_norm",
    "reward": "reward",
    "kl": "kl",
}


class Meter:
    """One phase's measurements on one rank. Only rank 0 writes files and draws a bar."""

    def __init__(self, directory: PhaseDir, labels: Mapping[str, str], port: int, tracking: Tracking) -> None:
        self.directory = directory
        self.labels = dict(labels)
        self.rank = int(labels["rank"])
        self.tracking = tracking
        self.registry = CollectorRegistry()
        self._collectors = {m.name: _collector(m, self.registry) for m in METRICS}
        self.port = self._serve(port)
        self.step = 0
        self.total_steps = 0
        self.seconds_before = 0.0
        self._started = time.monotonic()
        self._first_step = 0
        self._parts: dict[str, float] = {}
        self._tokens = 0
        self._samples = 0
        self._rate: float | None = None
        self._mark = time.monotonic()
        self._progress = Progress(metrics_port=self.port)
        self._progress_at = 0.0
        self._file: Any = None
        self._bar: Any = None
        self._wandb: Any = None

    # -- the phase's view

    def begin(self, step: int, total_steps: int, settings: Mapping[str, Any] | None = None) -> None:
        """Start, or go on, at ``step``. Lines of steps that will be repeated are dropped from metrics.jsonl."""
        self.step, self.total_steps, self._first_step = step, total_steps, step
        self._mark = self._loop_started = time.monotonic()
        self._gauge("total_steps").set(total_steps)
        if self.rank == 0:
            _rewind(self.directory, step)
            self._file = self.directory.metrics.open("a")
            self._bar = _progress_bar(step, total_steps, self.labels["phase"])
            self._wandb = _wandb_run(self.tracking, self.labels, settings or {})
        self.stage("")

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Time a part of the step (one of :data:`PARTS`)."""
        start = time.perf_counter()
        try:
            yield
        finally:
            seconds = time.perf_counter() - start
            self._parts[name] = self._parts.get(name, 0.0) + seconds
            self._collectors[PREFIX + "part_seconds_total"].labels(*self._label_values(), name).inc(seconds)

    def count(self, tokens: int, samples: int) -> None:
        self._tokens += tokens
        self._samples += samples
        self._counter("tokens_total").inc(tokens)
        self._counter("samples_total").inc(samples)

    def log(self, step: int, **values: float) -> None:
        """Finish a step: ``step`` counts finished steps, ``values`` are this step's metrics."""
        now = time.monotonic()
        rate = self._tokens / max(now - self._mark, 1e-9)
        self._rate = rate if self._rate is None else 0.8 * self._rate + 0.2 * rate
        self.step, self._mark = step, now
        self._update_gauges(values)
        if self.rank == 0:
            self._write(step, values)
        self._parts, self._tokens, self._samples = {}, 0, 0

    def record(self, step: int, **values: float) -> None:
        """Write an extra line (an evaluation) without finishing a step."""
        if self.rank == 0 and self._file is not None:
            self._write_line({"step": step, **values})
            if self._wandb is not None:
                self._wandb.log(values, step=step)

    def stage(self, text: str) -> None:
        """Say what goes on outside the steps; empty while stepping."""
        self._progress = self._progress.model_copy(update={"stage": text})
        self._publish(force=True)

    def seconds(self) -> float:
        """Wall-clock seconds of work, earlier attempts included."""
        return self.seconds_before + time.monotonic() - self._started

    def close(self) -> None:
        for closable in (self._file, self._bar):
            if closable is not None:
                closable.close()
        if self._wandb is not None:
            self._wandb.finish()

    # -- details

    def _update_gauges(self, values: Mapping[str, float]) -> None:
        for key, name in GAUGES_FROM_LOG.items():
            if key in values:
                self._gauge(name).set(values[key])
        self._gauge("step").set(self.step)
        self._gauge("progress_ratio").set(self.step / max(self.total_steps, 1))
        self._gauge("tokens_per_second").set(self._rate or 0.0)
        self._gauge("eta_seconds").set(self._eta())
        self._gauge("last_update_seconds").set(time.time())
        for kind, size in _memory().items():
            self._collectors[PREFIX + "memory_bytes"].labels(*self._label_values(), kind).set(size)

    def _eta(self) -> float:
        done = self.step - self._first_step
        elapsed = time.monotonic() - self._loop_started
        return elapsed / done * (self.total_steps - self.step) if done else 0.0

    def _write(self, step: int, values: Mapping[str, float]) -> None:
        if step % self.tracking.log_every == 0 or step == self.total_steps:
            line = {"step": step, "time": round(time.time(), 3), "tokens": self._tokens, "samples": self._samples}
            parts = {f"seconds_{name}": round(seconds, 6) for name, seconds in self._parts.items()}
            self._write_line({**line, **values, **parts})
            if self._wandb is not None:
                self._wandb.log(dict(values), step=step)
        self._progress = self._progress.model_copy(
            update={
                "step": step,
                "total_steps": self.total_steps,
                "loss": values.get("loss", self._progress.loss),
                "tokens_per_second": self._rate,
                "eta_seconds": self._eta(),
            }
        )
        self._publish()
        if self._bar is not None:
            self._bar.update(step - self._bar.n)

    def _write_line(self, line: Mapping[str, Any]) -> None:
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()

    def _publish(self, force: bool = False) -> None:
        if self.rank or not (force or time.monotonic() - self._progress_at > 0.5):
            return
        self._progress_at = time.monotonic()
        update = {"updated_at": time.time(), "step": self.step, "total_steps": self.total_steps}
        self._progress = self._progress.model_copy(update=update)
        write_atomic(self.directory.progress, json.dumps(self._progress.document()))

    def _serve(self, port: int) -> int:
        """Serve /metrics. A port of its own choice (0) is for this machine only; a taken one is not worth failing for."""
        try:
            server, _ = start_http_server(port, "0.0.0.0" if port else "127.0.0.1", registry=self.registry)  # noqa: S104
        except OSError as error:
            print(f"metrics: port {port} cannot be used ({error.strerror}), taking another", file=sys.stderr)
            server, _ = start_http_server(0, "127.0.0.1", registry=self.registry)
        return int(server.server_port)

    def _label_values(self) -> tuple[str, ...]:
        return tuple(self.labels[name] for name in COMMON_LABELS)

    def _gauge(self, name: str) -> Any:
        return self._collectors[PREFIX + name].labels(*self._label_values())

    _counter = _gauge


def _collector(metric: MetricDef, registry: CollectorRegistry) -> Any:
    kind = Counter if metric.kind == "counter" else Gauge
    return kind(metric.name, metric.help, COMMON_LABELS + metric.labels, registry=registry)


def _rewind(directory: PhaseDir, step: int) -> None:
    """Drop lines after ``step``, and a torn last line that a kill left."""
    if not directory.metrics.exists():
        return
    kept = []
    for line in directory.metrics.read_text().splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except json.JSONDecodeError:
            continue
    write_atomic(directory.metrics, "".join(kept))


def _progress_bar(step: int, total: int, name: str) -> Any:
    if not sys.stderr.isatty():
        return None
    from tqdm import tqdm

    return tqdm(initial=step, total=total, desc=name, unit="step")


def _wandb_run(tracking: Tracking, labels: Mapping[str, str], settings: Mapping[str, Any]) -> Any:
    """A wandb run if a project is set and the package is there; metrics.jsonl is written in any case."""
    if tracking.wandb_project is None:
        return None
    try:
        import wandb
    except ImportError:
        print("wandb is not installed: metrics go to metrics.jsonl only", file=sys.stderr)
        return None
    name = f"{labels['run']}-{labels['phase']}"
    return wandb.init(project=tracking.wandb_project, name=name, id=name, resume="allow", config=dict(settings))


def _memory() -> dict[str, int]:
    sizes = {"resident": psutil.Process(os.getpid()).memory_info().rss}
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        sizes["device"] = torch.cuda.memory_allocated()
        sizes["device_peak"] = torch.cuda.max_memory_allocated()
    return sizes

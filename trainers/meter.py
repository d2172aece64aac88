"""What a phase measures, and where it goes: /metrics, metrics.jsonl, progress.json, a progress bar, wandb.

Imports no torch.
"""

import json
import math
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from wsgiref.simple_server import WSGIServer

import psutil
from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.registry import Collector

from trainers import __version__, jsonl
from trainers.contract import Progress
from trainers.files import begin_file, write_atomic
from trainers.metrics import COMMON_LABELS, GAUGES_FROM_LOG, METRICS, PAIRWISE, PREFIX
from trainers.phase_dir import PhaseDir
from trainers.spec import Tracking
from trainers.tracker import Tracker


class TeacherMeter:
    """One served teacher's measurements. Safe to be called by several threads."""

    def __init__(self, seconds: Any, retries: Any, share: Callable[[], Any]) -> None:
        self._seconds, self._retries, self._share = seconds, retries, share

    def answered(self, seconds: float) -> None:
        self._seconds.observe(seconds)

    def asked_again(self) -> None:
        self._retries.inc()

    def share_of_loss(self, share: float) -> None:
        self._share().set(share)


class Meter:
    """One phase's measurements on one rank. Only rank 0 writes files and draws a bar."""

    def __init__(self, directory: PhaseDir, labels: Mapping[str, str], port: int, tracking: Tracking) -> None:
        self.directory = directory
        self.labels = dict(labels)
        self.rank = int(labels["rank"])
        self.tracking = tracking
        self.registry = CollectorRegistry()
        self._collectors = {m.name: m.collector(self.registry, COMMON_LABELS) for m in METRICS}
        self._server = self._serve(port)
        self.port = int(self._server.server_port)
        self.step = 0
        self.total_steps = 0
        self.seconds_before = 0.0
        self._started = time.monotonic()
        self._first_step = 0
        self._processes = 1
        self._parts: dict[str, float] = {}
        self._tokens = 0
        self._samples = 0
        self._rate: float | None = None
        self._mark = time.monotonic()
        self._progress = Progress(metrics_port=self.port)
        self._progress_at = 0.0
        self._file: Any = None
        self._bar: Any = None
        self._tracker: Tracker | None = None

    # -- the phase's view

    def describe(self, device: str, processes: int, peak_flops: float | None, sensors: Collector | None) -> None:
        """What this process runs on. ``peak_flops``: of its device, per second; ``sensors``: further figures of it."""
        self._processes = processes
        self._of("info", __version__, device, str(processes)).set(1)
        if peak_flops is not None:
            self._of("peak_flops_per_second").set(peak_flops)
        if sensors is not None:
            self.registry.register(sensors)

    def begin(self, step: int, total_steps: int, settings: Mapping[str, Any] | None = None) -> None:
        """Start, or go on, at ``step``. Lines of steps that will be repeated are dropped from metrics.jsonl."""
        self.step, self.total_steps, self._first_step = step, total_steps, step
        self._mark = self._loop_started = time.monotonic()
        self._of("total_steps").set(total_steps)
        if self.rank == 0:
            self._file = begin_file(self.directory.metrics, _lines_until(self.directory, step))
            self._bar = _progress_bar(step, total_steps, self.labels["phase"])
            self._tracker = _tracker(self.tracking, self.labels, self.directory, settings or {})
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
            self._of("part_seconds_total", name).inc(seconds)

    def count(self, tokens: int, samples: int, flops: float = 0.0) -> None:
        """Work of this process alone."""
        self._tokens += tokens
        self._samples += samples
        self._of("tokens_total").inc(tokens)
        self._of("samples_total").inc(samples)
        if flops:
            self._of("model_flops_total").inc(flops)

    def teacher(self, name: str) -> TeacherMeter:
        """Of a served teacher; the only one of a phase has no name."""
        of = name or "teacher"
        seconds, retries = self._of("teacher_answer_seconds", of), self._of("teacher_retries_total", of)
        return TeacherMeter(seconds, retries, lambda: self._of("teacher_loss_ratio", of))

    def checkpointed(self, step: int) -> None:
        self._of("checkpoints_total").inc()
        self._checkpoint(step)

    def will_checkpoint(self, step: int) -> None:
        """From now on checkpoints may be expected; the newest is that of ``step``, 0 for none."""
        self._of("checkpoints_total")
        self._checkpoint(step)

    def log(self, step: int, **values: float) -> None:
        """Finish a step: ``step`` counts finished steps, ``values`` are this step's metrics."""
        now = time.monotonic()
        rate = self._tokens / max(now - self._mark, 1e-9)
        self._rate = rate if self._rate is None else 0.8 * self._rate + 0.2 * rate
        self._of("step_seconds").observe(now - self._mark)
        self.step, self._mark = step, now
        self._update_gauges(values)
        if self.rank == 0:
            self._write(step, values)
        self._parts, self._tokens, self._samples = {}, 0, 0

    def record(self, step: int, **values: float) -> None:
        """Write an extra line (an evaluation) without finishing a step."""
        self._set_gauges(values)
        if self.rank == 0 and self._file is not None:
            self._write_line({"step": step, **values})
            if self._tracker is not None:
                self._tracker.log(step, values)

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
        if self._tracker is not None:
            self._tracker.finish()

    def take_page_down(self) -> None:
        """Its last figures have been there until now. Nobody waits for the server, which looks up twice a second."""
        threading.Thread(target=_end, args=[self._server], daemon=True).start()

    # -- details

    def _update_gauges(self, values: Mapping[str, float]) -> None:
        self._set_gauges(values)
        self._of("step").set(self.step)
        self._of("progress_ratio").set(self.step / max(self.total_steps, 1))
        self._of("tokens_per_second").set(self._rate or 0.0)
        self._of("eta_seconds").set(self._eta())
        self._of("last_step_timestamp_seconds").set(time.time())
        for kind, size in _memory().items():
            self._of("memory_bytes", kind).set(size)

    def _set_gauges(self, values: Mapping[str, float]) -> None:
        for key, name in GAUGES_FROM_LOG.items():
            if key in values:
                margin = name == "reward" and self.labels["type"] in PAIRWISE
                self._of("reward_margin" if margin else name).set(values[key])

    def _checkpoint(self, step: int) -> None:
        self._of("checkpoint_step").set(step)
        self._of("last_checkpoint_timestamp_seconds").set(time.time())
        self._progress = self._progress.model_copy(update={"checkpoint_step": step})
        self._publish()

    def _eta(self) -> float:
        done = self.step - self._first_step
        elapsed = time.monotonic() - self._loop_started
        return elapsed / done * (self.total_steps - self.step) if done else 0.0

    def _write(self, step: int, values: Mapping[str, float]) -> None:
        if step % self.tracking.log_every == 0 or step == self.total_steps:
            line = {"step": step, "time": round(time.time(), 3), "tokens": self._tokens, "samples": self._samples}
            parts = {f"seconds_{name}": round(seconds, 6) for name, seconds in self._parts.items()}
            self._write_line({**line, **values, **parts})
            if self._tracker is not None:
                self._tracker.log(step, values)
        self._progress = self._progress.model_copy(
            update={
                "step": step,
                "total_steps": self.total_steps,
                "loss": _finite(values.get("loss", self._progress.loss)),
                # Of all processes, which share the work evenly; this one knows its own.
                "tokens_per_second": self._rate * self._processes if self._rate is not None else None,
                "eta_seconds": self._eta(),
            }
        )
        self._publish()
        if self._bar is not None:
            self._bar.update(step - self._bar.n)

    def _write_line(self, line: Mapping[str, Any]) -> None:
        self._file.write(jsonl.dump({key: _finite(value) for key, value in line.items()}))
        self._file.flush()

    def _publish(self, force: bool = False) -> None:
        if self.rank or not (force or time.monotonic() - self._progress_at > 0.5):
            return
        self._progress_at = time.monotonic()
        update = {"updated_at": time.time(), "step": self.step, "total_steps": self.total_steps}
        self._progress = self._progress.model_copy(update=update)
        write_atomic(self.directory.progress, json.dumps(self._progress.document(), allow_nan=False))

    def _serve(self, port: int) -> WSGIServer:
        """Serve /metrics. A port of its own choice (0) is for this machine only; a taken one is not worth failing for."""
        try:
            return start_http_server(port, "0.0.0.0" if port else "127.0.0.1", registry=self.registry)[0]  # noqa: S104
        except OSError as error:
            print(f"metrics: port {port} cannot be used ({error.strerror}), taking another", file=sys.stderr)
            return start_http_server(0, "127.0.0.1", registry=self.registry)[0]

    def _of(self, name: str, *more: str) -> Any:
        """The series of a metric; ``more`` are the values of its further labels."""
        return self._collectors[PREFIX + name].labels(*(self.labels[label] for label in COMMON_LABELS), *more)


def _end(server: WSGIServer) -> None:
    server.shutdown()
    server.server_close()


def _finite(value: Any) -> Any:
    """JSON has no NaN; what is not finite is a gap in the curve."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _lines_until(directory: PhaseDir, step: int) -> str:
    """The lines so far, without those after ``step`` and a torn last line that a kill left."""
    if not directory.metrics.exists():
        return ""
    return jsonl.dumps([line for line in jsonl.read_whole_lines(directory.metrics) if line["step"] <= step])


def _progress_bar(step: int, total: int, name: str) -> Any:
    if not sys.stderr.isatty():
        return None
    from tqdm import tqdm

    return tqdm(initial=step, total=total, desc=name, unit="step")


def _tracker(
    tracking: Tracking, labels: Mapping[str, str], directory: PhaseDir, settings: Mapping[str, Any]
) -> Tracker | None:
    if tracking.wandb_project is None:
        return None
    return Tracker(tracking.wandb_project, f"{labels['run']}-{labels['phase']}", directory, settings)


def _memory() -> dict[str, int]:
    sizes = {"resident": psutil.Process(os.getpid()).memory_info().rss}
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        sizes["device"] = torch.cuda.memory_allocated()
        sizes["device_peak"] = torch.cuda.max_memory_allocated()
    return sizes

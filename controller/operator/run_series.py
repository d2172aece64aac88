"""Series of each run, as kube-state-metrics has them for Kubernetes' own kinds: what the last look has seen.

A run's lines are written when it is looked at, and a page joins them. Made anew for each page by prometheus_client, those of
nine thousand runs took a second, and beside a busy operator more than the five that a test waits.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime

from prometheus_client.utils import floatToGoString

from controller.api.run import AlignmentRun, FailurePolicy
from controller.api.status import Attempt, AttemptState, PhaseStatus, RunStatus
from controller.memory import Key
from controller.operator.metrics import PREFIX, RUN_METRICS
from controller.plan.attempts import budget, of_settings, spent
from controller.plan.resolve import merge_templates
from trainers.contract import FailureClass

Sample = tuple[str, tuple[str, ...], float]
"""A metric's name without its prefix, its label values, its value."""

RESULTS = 20_000
"""Final figures that are shown at most. One evaluation of many models has two hundred, and runs stay for months;
what falls out was scraped while it was shown."""
RESULTS_OF_A_RUN = 5_000
"""Else they are not shown: it was a pod that named them."""


ENDED = 1_000
"""Runs that have ended and are still shown, the newest: ten thousand make a page of 60 MB, and what falls out was scraped."""


@dataclass(frozen=True)
class _Seen:
    started: float
    ended: bool
    lines: dict[str, str]
    """By metric."""
    results: dict[str, str]
    figures: int
    """Of the results."""


class RunSeries:
    def __init__(self) -> None:
        self._seen: dict[Key, _Seen] = {}
        self._ended = 0
        """At most so many have ended."""

    def seen(self, key: Key, state: str, run: AlignmentRun | None, status: RunStatus) -> None:
        """``run`` is None for one that could not be read."""
        samples = [*_run_samples(key, state, run, status), *(_phases(key, run, status) if run else ())]
        started = status.started_at.timestamp() if status.started_at else 0.0
        ended = state in ("Succeeded", "Failed")
        results = list(_results(key, status))
        self._seen[key] = _Seen(started, ended, _lines(samples), _lines(results), len(results))
        self._ended += ended
        # Now and then: nobody counts what comes and goes.
        if self._ended > 2 * ENDED:
            self._forget_old()

    def gone(self, key: Key) -> None:
        self._seen.pop(key, None)

    def _forget_old(self) -> None:
        ended = [(key, seen) for key, seen in self._newest() if seen.ended]
        for key, _ in ended[ENDED:]:
            del self._seen[key]
        self._ended = min(len(ended), ENDED)

    def _newest(self) -> list[tuple[Key, _Seen]]:
        """By turns of their namespaces."""
        return _by_turns(sorted(self._seen.items(), key=lambda item: item[1].started, reverse=True))

    def page(self) -> str:
        """In Prometheus' text format, which wants all lines of a metric together."""
        shown = list(self._shown())
        parts: list[str] = []
        for metric in RUN_METRICS:
            parts.append(f"# HELP {metric.name} {metric.help}\n# TYPE {metric.name} {metric.kind}\n")
            parts += [lines[metric.name] for lines in shown if metric.name in lines]
        return "".join(parts)

    def _shown(self) -> Iterator[dict[str, str]]:
        """All lines but of old runs that have ended; of the results those of the newest runs, of each run all or none."""
        room, ended = RESULTS, ENDED
        for _, seen in self._newest():
            ended -= seen.ended
            if seen.ended and ended < 0:
                continue
            yield seen.lines
            if seen.figures <= min(room, RESULTS_OF_A_RUN):
                room -= seen.figures
                yield seen.results


_METRICS = {metric.name: metric for metric in RUN_METRICS}
_ESCAPED = str.maketrans({"\\": r"\\", "\n": r"\n", '"': r"\""})


def _lines(samples: Iterable[Sample]) -> dict[str, str]:
    found: defaultdict[str, str] = defaultdict(str)
    for name, values, value in samples:
        metric = _METRICS[PREFIX + name]
        pairs = zip(metric.labels, values, strict=True)
        labels = ",".join(f'{label}="{text.translate(_ESCAPED)}"' for label, text in pairs)
        found[metric.name] += f"{metric.name}{{{labels}}} {floatToGoString(value)}\n"
    return dict(found)


def _by_turns(runs: Sequence[tuple[Key, _Seen]]) -> list[tuple[Key, _Seen]]:
    """The first of each namespace, then the second of each, and so on: no namespace takes another one's room."""
    places: Counter[str] = Counter()
    turns = []
    for key, seen in runs:
        turns.append((places[key.namespace], key, seen))
        places[key.namespace] += 1
    return [(key, seen) for _, key, seen in sorted(turns, key=lambda turn: turn[0])]


def gpus_of(run: AlignmentRun, phase: str, attempt: Attempt) -> int:
    """GPUs of a phase's job, as it says itself, since the spec may be edited; of one of an earlier version, by the spec."""
    if attempt.takes:
        return sum(amount for name, amount in attempt.takes.items() if name.endswith("/gpu"))
    entry = next((e for e in run.phases if e.name == phase), None)
    if entry is None:
        return 0
    template = merge_templates(run.spec.template, entry.template)
    limits = template.resources.limits if template.resources else {}
    nodes = attempt.nodes or template.nodes or 1
    return nodes * sum(int(n) for name, n in limits.items() if name.endswith("/gpu") and n.isdigit())


def _run_samples(key: Key, state: str, run: AlignmentRun | None, status: RunStatus) -> Iterator[Sample]:
    yield "run_state", (*key, state), 1.0
    yield "run_progress_ratio", key, status.percent / 100
    yield from _times("run", key, status.started_at, status.finished_at)
    if run is not None:
        yield "run_info", (*key, run.metadata.uid or "", run.spec.queue_name or ""), 1.0
        yield from _time("run_created", key, run.metadata.creation_timestamp)


def _phases(key: Key, run: AlignmentRun, status: RunStatus) -> Iterator[Sample]:
    for phase in status.phases:
        labels = (*key, phase.name, phase.type)
        yield "phase_state", (*labels, phase.state), 1.0
        yield from _times("phase", labels, phase.started_at, phase.finished_at)
        yield "phase_attempts", labels, phase.tries
        at_work = [a for a in phase.attempts if not a.state.ended and a.state != AttemptState.ASKED and a.started_at]
        yield "phase_gpus", labels, gpus_of(run, phase.name, at_work[-1]) if at_work else 0
        for failure, count in _failures(phase, run.spec.failure_policy).items():
            yield "phase_retries_used", (*labels, failure), count
            yield "phase_retries_allowed", (*labels, failure), budget(run.spec.failure_policy.retries, failure)


def _results(key: Key, status: RunStatus) -> Iterator[Sample]:
    for phase in status.phases:
        for metric, value in phase.metrics.items():
            yield "phase_result", (*key, phase.name, phase.type, metric), value


def _failures(phase: PhaseStatus, policy: FailurePolicy) -> Counter[FailureClass]:
    """Of what is asked for now: earlier settings' failures do not count, nor do those that use up no budget."""
    newest = phase.attempts[-1].settings if phase.attempts else ""
    counted = of_settings(phase.attempts, phase.digest, newest) if phase.digest else phase.attempts
    found: Counter[FailureClass] = Counter()
    for attempt in spent(counted, policy):
        if attempt.state == AttemptState.FAILED and attempt.failure is not None:
            found[attempt.failure] += attempt.times
    return found


def _times(what: str, labels: tuple[str, ...], start: datetime | None, end: datetime | None) -> Iterator[Sample]:
    yield from _time(f"{what}_start", labels, start)
    yield from _time(f"{what}_end", labels, end)


def _time(what: str, labels: tuple[str, ...], moment: datetime | None) -> Iterator[Sample]:
    if moment is not None:
        yield f"{what}_timestamp_seconds", labels, moment.timestamp()

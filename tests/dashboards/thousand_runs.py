"""A thousand runs that nobody carried out: series by the tables of metrics, as a file that promtool makes blocks from."""

from collections.abc import Callable, Iterator
from pathlib import Path

from monitoring.prometheus import promtool

from controller.operator import metrics as operator
from trainers import metrics as trainer

RUNS = 1000
STEP = 240
"""Seconds between two samples; five minutes would be too old."""
PHASES = ("sft", "reward", "dpo", "traces", "distill", "eval")
TYPES = {"sft": "sft", "reward": "reward", "dpo": "dpo", "traces": "rollout", "distill": "distill", "eval": "evaluate"}
RUN_STATES = (
    "Succeeded",
    "Running",
    "Queued",
    "Succeeded",
    "Failed",
    "Running",
    "Suspended",
    "Succeeded",
    "Waiting",
    "Succeeded",
)
Labels = dict[str, str]


def make(data: Path, end: float, hours: float = 1) -> None:
    """Blocks in Prometheus' folder ``data``."""
    text = data.with_suffix(".om")
    times = range(int(end - 3600 * hours), int(end) + 1, STEP)
    with text.open("w") as file:
        for line in _lines(list(times), end):
            file.write(line)
    promtool("tsdb", "create-blocks-from", "openmetrics", str(text), str(data))
    text.unlink()


def name_of(run: int) -> Labels:
    return {"namespace": f"team-{run % 25}", "run": f"run-{run:04}"}


def _lines(times: list[int], end: float) -> Iterator[str]:
    by_name = {metric.name: metric for metric in (*operator.METRICS, *trainer.METRICS)}
    for name, series in _series(end).items():
        metric = by_name[name]
        yield f"# TYPE {name.removesuffix('_total')} {metric.kind}\n"
        for labels, value in series:
            own = (
                set(labels)
                - {"pod"}
                - (set(trainer.COMMON_LABELS) | {"namespace"} if name.startswith(trainer.PREFIX) else set())
            )
            assert own == set(metric.labels), (name, labels)
            head = name + "{" + ",".join(f'{key}="{value}"' for key, value in labels.items()) + "}"
            yield "".join(f"{head} {value} {at}\n" for at in times)
    yield "# EOF\n"


def _series(end: float) -> dict[str, list[tuple[Labels, float]]]:
    """Metric's name to its series."""
    found: dict[str, list[tuple[Labels, float]]] = {}

    def add(prefix: str, name: str, value: float, **labels: str) -> None:
        found.setdefault(prefix + name, []).append(({"pod": "operator-0", **labels}, value))

    for run in range(RUNS):
        own, state = name_of(run), RUN_STATES[run % len(RUN_STATES)]
        mine = operator.PREFIX
        add(mine, "run_state", 1, **own, state=state)
        add(mine, "run_info", 1, **own, uid=f"uid-{run}", queue=f"queue-{run % 40}")
        add(mine, "run_created_timestamp_seconds", end - 60 * run, **own)
        add(mine, "run_start_timestamp_seconds", end - 60 * run + 5, **own)
        add(mine, "run_progress_ratio", run % 11 / 10, **own)
        for number, phase in enumerate(PHASES):
            which = {**own, "phase": phase, "type": TYPES[phase]}
            phase_state = "Running" if state == "Running" and number == run % len(PHASES) else "Succeeded"
            add(mine, "phase_state", 1, **which, state=phase_state)
            add(mine, "phase_start_timestamp_seconds", end - 60 * run, **which)
            add(mine, "phase_end_timestamp_seconds", end - 30 * run, **which)
            add(mine, "phase_attempts", 1, **which)
            add(mine, "phase_gpus", 8 if phase_state == "Running" else 0, **which)
            add(mine, "phase_retries_used", run % 3, **which, **{"class": "Infrastructure"})
            if phase_state == "Running":
                for rank in range(2):
                    _trainer(add, which, rank)
        add(mine, "phase_result", 0.5, **own, phase="eval", type="evaluate", metric="distill/reward/winRate")
    for namespace in range(25):
        for state in operator.RUN_STATES:
            count = sum(RUN_STATES[run % 10] == state for run in range(namespace, RUNS, 25))
            add(operator.PREFIX, "runs", count, namespace=f"team-{namespace}", state=state)
    return found


def _trainer(add: Callable[..., None], which: Labels, rank: int) -> None:
    for name in (
        "loss",
        "progress_ratio",
        "tokens_per_second",
        "tokens_total",
        "gpu_utilization_ratio",
        "gpu_power_watts",
    ):
        add(trainer.PREFIX, name, 0.5 + rank, **which, rank=str(rank))

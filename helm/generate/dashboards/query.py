"""Queries of panels, variables and annotations, and the PromQL that several panels share."""

from typing import Any

from controller.operator import metrics as operator_metrics
from trainers import metrics as trainer_metrics

Object = dict[str, Any]
DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}


def line(expr: str, legend: str) -> Object:
    """Values over the time range; ``legend`` names each series."""
    return {"expr": expr, "legendFormat": legend, "range": True, "instant": False, "format": "time_series"}


def now(expr: str, legend: str) -> Object:
    """Values at the end of the time range."""
    return {"expr": expr, "legendFormat": legend, "range": False, "instant": True, "format": "time_series"}


def rows(expr: str) -> Object:
    """Values at the end of the time range as a table: a column per label, and the value."""
    return {"expr": expr, "legendFormat": "", "range": False, "instant": True, "format": "table"}


def operator(name: str, selector: str = "") -> str:
    """A series of the operator's table, whose prefix the dashboards do not repeat."""
    return _series(operator_metrics.PREFIX + name, selector)


def trainer(name: str, selector: str = "") -> str:
    return _series(trainer_metrics.PREFIX + name, selector)


def _series(name: str, selector: str) -> str:
    return f"{name}{{{selector}}}" if selector else name


def rate(series: str, by: str) -> str:
    return f"sum by ({by}) (rate({series}[$__rate_interval]))"


def counts(series: str, by: str) -> str:
    """Whole numbers: Prometheus stretches the increase between a window's samples to the window's ends."""
    return f"round(sum by ({by}) (increase({series}[$__rate_interval])))"


def increase(series: str, by: str) -> str:
    """Within the whole time range. ``by`` may be empty."""
    return f"sum by ({by}) (increase({series}[$__range]))"


def quantile(q: float, histogram: str, by: str = "", window: str = "$__rate_interval") -> str:
    """Of a histogram's buckets; ``by`` further labels that stay apart."""
    labels = ", ".join(label for label in ("le", by) if label)
    return f"histogram_quantile({q:g}, sum by ({labels}) (rate({histogram}[{window}])))"


def latest(name: str, selector: str, by: str) -> str:
    """The last value within the time range that the newest attempt said, which may have ended since."""
    stepped = trainer("last_step_timestamp_seconds", selector)
    newest = f"topk by ({by}) (1, last_over_time({stepped}[$__range]))"
    return f"max by ({by}) (last_over_time({trainer(name, selector)}[$__range]) and on ({by}, pod) {newest})"


def gpus_at_work(series: str) -> str:
    """Per phase. Idle phases, most of them, are left out first: grouping is what costs."""
    return f"max by (namespace, run, phase) ({series} > 0)"


def gpu_hours(series: str, by: str) -> str:
    """GPUs at work, added up over the time range: attempts that still run count too."""
    total = f"sum by ({by}) ({gpus_at_work(series)})"
    return f"sum_over_time(({total})[$__range:$__interval]) * $__interval_ms / 3.6e6"


def over_progress(expr: str, progress: str) -> str:
    """``expr``'s mean in each 5 % of ``progress`` as label ``progress``, both by namespace and run.

    So runs of different days and speeds lie over each other.
    """
    steps = f'count_values by (namespace, run) ("progress", floor(20 * ({progress})) * 5)'
    values = f"{steps} * on (namespace, run) group_left () ({expr})"
    mean = f"avg_over_time(({values})[$__range:$__interval])"
    return f'label_join({mean}, "run", "/", "namespace", "run")'

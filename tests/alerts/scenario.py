"""What Prometheus sees in a scenario, minute by minute, and which alerts fire then: all that are not named are silent."""

from dataclasses import dataclass, field
from typing import Any

Series = dict[str, str]
"""Series to values in promtool's notation: `0+60x9` is ten values, `_x5` five times nothing, `stale` an end."""

RUN = {"namespace": "team-a", "run": "helpful"}
PHASE = {**RUN, "phase": "dpo", "type": "dpo"}
POD = "helpful-dpo-1-worker-0"
LEADER, OTHER = "alignment-operator-a", "alignment-operator-b"
LONG = 310
"""Minutes that series last unless it is said."""


@dataclass(frozen=True)
class Fires:
    alert: str
    labels: dict[str, str]
    summary: str
    description: str


@dataclass(frozen=True)
class Scenario:
    title: str
    series: Series
    moments: dict[int, tuple[Fires, ...]]
    """Minute to what fires then."""
    nearly: tuple[str, ...] = ()
    """Alerts for which this is a near miss: it looks like their reason, or was it until now."""
    operator: bool = field(default=True)
    """Whether a healthy operator is beside it."""

    def document(self, alerts: list[str], severities: dict[str, str]) -> dict[str, Any]:
        """As one of promtool's tests: every alert at every moment."""
        series = {**(healthy_operator() if self.operator else {}), **self.series}
        return {
            "name": self.title,
            "interval": "1m",
            "input_series": [{"series": name, "values": values} for name, values in series.items()],
            "alert_rule_test": [
                {
                    "eval_time": f"{minute}m",
                    "alertname": alert,
                    "exp_alerts": [_expected(f, severities) for f in firing if f.alert == alert],
                }
                for minute, firing in self.moments.items()
                for alert in alerts
            ],
        }


def _expected(fires: Fires, severities: dict[str, str]) -> dict[str, Any]:
    annotations = {
        "summary": fires.summary, "description": fires.description, "runbook_url": f"RUNBOOKS/{fires.alert}.md",
    }  # fmt: skip
    return {"exp_labels": {"severity": severities[fires.alert], **fires.labels}, "exp_annotations": annotations}


def silent(*minutes: int) -> dict[int, tuple[Fires, ...]]:
    return dict.fromkeys(minutes, ())


def trainer(name: str, values: str, labels: dict[str, str] = PHASE, pod: str = POD, **more: str) -> Series:
    """A series of rank 0, with the labels of the target that Prometheus adds."""
    target = {"pod": pod, "container": "pytorch", "instance": f"{pod}:9400", "job": "alignment-trainers"}
    return {_series(f"alignment_trainer_{name}", {**labels, "rank": "0", **target, **more}): values}


def operator(name: str, values: str, labels: dict[str, str] | None = None, pod: str = LEADER, **more: str) -> Series:
    """What a series says of its namespace counts (honorLabels); the operator's own is that of its pod."""
    target = {"namespace": "alignment-system", "pod": pod, "instance": f"{pod}:8080", "job": "alignment-operator"}
    return {_series(f"alignment_operator_{name}", {**target, **(labels or {}), **more}): values}


def _series(name: str, labels: dict[str, str]) -> str:
    pairs = ",".join(f'{key}="{value}"' for key, value in labels.items())
    return f"{name}{{{pairs}}}"


def healthy_operator(minutes: int = LONG) -> Series:
    """Two replicas, of which one acts and looks at runs all the time."""
    calls = {"verb": "list", "resource": "pods", "code": "200"}
    watch = {"resource": "alignmentruns"}
    return {
        **operator("info", f"1x{minutes}", version="0.1.0"),
        **operator("info", f"1x{minutes}", pod=OTHER, version="0.1.0"),
        **operator("leader", f"1x{minutes}"),
        **operator("leader", f"0x{minutes}", pod=OTHER),
        **operator("reconcile_seconds_count", f"0+4x{minutes}", outcome="ok"),
        **operator("workqueue_depth", f"0x{minutes}"),
        **operator("api_requests_total", f"0+8x{minutes}", calls),
        **operator("watch_events_total", f"5+1x{minutes}", watch),
        **operator("watch_events_total", f"5+1x{minutes}", watch, pod=OTHER),
        **operator("watch_dead", f"0x{minutes}", watch),
        **operator("watch_dead", f"0x{minutes}", watch, pod=OTHER),
    }


def running(minutes: int = LONG, labels: dict[str, str] = PHASE, pod: str = LEADER) -> Series:
    """A run and a phase of it that are at work."""
    run = {key: labels[key] for key in RUN}
    return {
        **operator("run_state", f"1x{minutes}", run, pod, state="Running"),
        **operator("runs", f"1x{minutes}", {"namespace": labels["namespace"]}, pod, state="Running"),
        **operator("phase_state", f"1x{minutes}", labels, pod, state="Running"),
        **operator("phase_start_timestamp_seconds", f"0x{minutes}", labels, pod),
    }


def training(minutes: int = LONG, labels: dict[str, str] = PHASE, pod: str = POD) -> Series:
    """A pod that makes a step and writes a checkpoint each minute."""
    count = f"1+1x{minutes}"
    return {
        **trainer("info", f"1x{minutes}", labels, pod, version="0.1.0", device="cuda", processes="1"),
        **trainer("step", count, labels, pod),
        **trainer("checkpoint_step", count, labels, pod),
        **trainer("last_step_timestamp_seconds", f"0+60x{minutes}", labels, pod),
        **trainer("last_checkpoint_timestamp_seconds", f"0+60x{minutes}", labels, pod),
        **trainer("tokens_per_second", f"1000x{minutes}", labels, pod),
        **trainer("loss", f"0.7x{minutes}", labels, pod),
        **trainer("gpu_utilization_ratio", f"0.9x{minutes}", labels, pod),
    }

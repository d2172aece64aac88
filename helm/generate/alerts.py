"""Prometheus' alerts, one table: what fires, how badly, and what it says. Each has a page in docs/runbooks.

Two things shape the expressions. Series of a pod end with it, so what must be told after a pod's end comes from the
operator, which tells of a run for as long as it exists; and only the replica that acts has these, under another pod's
name after each change, so they are always aggregated to what they are about.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from textwrap import dedent
from typing import Any

import yaml

from generate import NOTICE

Object = dict[str, Any]

RUNBOOKS = "RUNBOOKS"
"""Stands for the address of the folder with the runbooks, which only an installation knows."""

OPERATOR_NAMESPACE = "OPERATOR_NAMESPACE"
"""Stands for the namespace of the installation: there may be several, and one that lives must not hide one that does not."""

RUN = "run {{ $labels.namespace }}/{{ $labels.run }}"
PHASE = f"phase {{{{ $labels.phase }}}} of {RUN}"


@dataclass(frozen=True)
class Alert:
    name: str
    severity: str
    """`critical`: somebody should look now; `warning`: today."""
    wait: str
    """For how long the expression must hold."""
    expr: str
    summary: str
    description: str

    def rule(self) -> Object:
        return {
            "alert": self.name,
            "expr": dedent(self.expr).strip(),
            **({"for": self.wait} if self.wait != "0m" else {}),
            "labels": {"severity": self.severity},
            "annotations": {
                "summary": self.summary,
                "description": " ".join(self.description.split()),
                "runbook_url": f"{RUNBOOKS}/{self.name}.md",
            },
        }


def first_up(text: str) -> str:
    """As the begin of a sentence."""
    return text[0].upper() + text[1:]


def recent(metric: str) -> str:
    """Median of the last minutes, of each attempt that is there now: what is taken over time outlives the pod."""
    return f"max by (namespace, run, phase, type, pod) (quantile_over_time(0.5, {metric}[10m]) and {metric})"


def earlier(metric: str) -> str:
    return f"max by (namespace, run, phase, type, pod) (quantile_over_time(0.5, {metric}[6h] offset 10m))"


def lowest(metric: str) -> str:
    """Of the hourly medians of half a day: against the last hour alone, what stays exploded would soon look normal."""
    medians = f"quantile_over_time(0.5, {metric}[1h])[12h:10m]"
    return f"max by (namespace, run, phase, type, pod) (min_over_time({medians} offset 10m))"


def not_finite(metric: str) -> str:
    """NaN is equal to nothing, itself included."""
    return f"max by (namespace, run, phase, type, pod) ({metric} != {metric} or abs({metric}) == Inf)"


LOSS = 'alignment_trainer_loss{rank="0", type!="ppo"}'
"""That of PPO is a sum of terms around zero, so its size says nothing."""
KL = 'alignment_trainer_kl_nats{rank="0"}'
POLICY_KL = 'alignment_trainer_kl_nats{rank="0", type!="distill"}'
"""A policy begins at its reference; a student begins as far from its teacher as it is."""
REWARD = 'alignment_trainer_reward{rank="0", type="ppo"}'
LENGTH = 'alignment_trainer_response_length_tokens{rank="0", type="ppo"}'
ANY_LENGTH = 'alignment_trainer_response_length_tokens{rank="0"}'
SPEED = 'alignment_trainer_tokens_per_second{rank="0", type!~"evaluate|package"}'
"""The steps of an evaluation are benchmarks, which differ."""

RUNS = (
    Alert(
        "AlignmentRunStalled",
        "critical",
        "2m",
        """
        (
          max by (namespace, run, phase, type) (alignment_operator_phase_state{state="Running"})
          and on (namespace, run) max by (namespace, run) (alignment_operator_run_state{state="Stalled"})
        )
        unless on (namespace, run, phase)
          (time() - max by (namespace, run, phase) (alignment_trainer_last_step_timestamp_seconds) < 120)
        """,
        f"{first_up(PHASE)} makes no progress",
        """The phase has finished no step for longer than the run's failurePolicy.stalledAfterSeconds (900 s
        unless set). Its pods keep their GPUs; nothing is stopped unless failurePolicy.stallTimeoutSeconds
        is set.""",
    ),
    Alert(
        "AlignmentFirstStepOverdue",
        "warning",
        "1h",
        """
        max by (namespace, run, phase, type) (alignment_trainer_info{rank="0"})
        unless on (namespace, run, phase) max by (namespace, run, phase) (alignment_trainer_step)
        """,
        f"{first_up(PHASE)} has not finished its first step after an hour",
        """The {{ $labels.type }} phase has run for an hour and is still loading, or its processes wait for
        each other.""",
    ),
    Alert(
        "AlignmentPhaseDiverged",
        "critical",
        "0m",
        """
        max by (namespace, run, phase, type) (alignment_operator_phase_retries_used{class="Diverged"}) > 0
        and on (namespace, run, phase)
          time() - max by (namespace, run, phase) (alignment_operator_phase_end_timestamp_seconds) < 3600
        """,
        f"{first_up(PHASE)} has diverged",
        """The loss, the gradient or the reward of the {{ $labels.type }} phase was not finite, so it has ended
        and is not tried again. Phases that build on it cannot run.""",
    ),
    Alert(
        "AlignmentRunFailed",
        "warning",
        "0m",
        """
        time() - max by (namespace, run) (alignment_operator_run_end_timestamp_seconds) < 3600
        and on (namespace, run) max by (namespace, run) (alignment_operator_run_state{state="Failed"})
        """,
        f"{first_up(RUN)} has failed",
        """The run ended {{ $value | humanizeDuration }} ago with a phase that failed for good or a deadline
        that passed. What is finished is kept. This alert ends an hour after the run.""",
    ),
    Alert(
        "AlignmentRetryBudgetLow",
        "warning",
        "0m",
        """
        (
          max by (namespace, run, phase, type, class) (alignment_operator_phase_retries_allowed)
          - max by (namespace, run, phase, type, class) (alignment_operator_phase_retries_used)
          <= 0.2 * max by (namespace, run, phase, type, class) (alignment_operator_phase_retries_allowed)
        )
        and on (namespace, run, phase)
          max by (namespace, run, phase) (alignment_operator_phase_state{state=~"Running|Ready|BackingOff"})
        """,
        f"{first_up(PHASE)} has {{{{ $value }}}} retries left after failures of class {{{{ $labels.class }}}}",
        """The {{ $labels.type }} phase has failed with {{ $labels.class }}. When its budget for that class
        (failurePolicy.retries) is used up, the next such failure ends it for good.""",
    ),
    Alert(
        "AlignmentQueueWaitLong",
        "warning",
        "2h",
        """
        max by (namespace, run) (last_over_time(alignment_operator_run_state{state="Queued"}[5m]))
        """,
        f"{first_up(RUN)} has waited in its queue for two hours",
        """Nothing of the run is admitted: its Kueue queue has no quota to give, or does not exist.""",
    ),
)

TRAINING = (
    Alert(
        "AlignmentLossExploded",
        "critical",
        "5m",
        f"""
        (
          {recent(LOSS)}
            > 2 * {lowest(LOSS)}
          and
          {recent(LOSS)}
            - {lowest(LOSS)} > 0.5
        )
        or {not_finite('alignment_trainer_loss{rank="0"}')}
        """,
        f"The loss of {PHASE} has risen to {{{{ $value | humanize }}}}",
        """The median loss of the last ten minutes in pod {{ $labels.pod }} ({{ $labels.type }}) is more than
        twice the lowest hourly median of the last twelve hours, or not finite.""",
    ),
    Alert(
        "AlignmentKlExploded",
        "critical",
        "5m",
        f"""
        (
          {recent(KL)}
            > 3 * {lowest(KL)}
          and {recent(KL)} > 1
        )
        or {recent(POLICY_KL)} > 5
        or {not_finite(KL)}
        """,
        f"The KL divergence of {PHASE} has reached {{{{ $value | humanize }}}} nats per token",
        """The model in pod {{ $labels.pod }} ({{ $labels.type }}) has left its reference, or a student its
        teacher: the median of the last ten minutes is above 1 and three times the lowest hourly median of the
        last twelve hours, above 5 in another phase than distill, or not finite.""",
    ),
    Alert(
        "AlignmentRewardOveroptimized",
        "warning",
        "15m",
        f"""
        {recent(REWARD)}
          > {earlier(REWARD)}
        and
        (
          (
            {recent(KL)}
              > 2 * {earlier(KL)}
            and {recent(KL)} > 0.5
          )
          or
          {recent(LENGTH)}
            > 1.5 * {earlier(LENGTH)}
        )
        """,
        f"{first_up(PHASE)} may be exploiting its reward model",
        """The reward in pod {{ $labels.pod }} still rises (now {{ $value | humanize }}) while the KL
        divergence from the reference or the length of the responses runs away.""",
    ),
    Alert(
        "AlignmentCheckpointOld",
        "warning",
        "5m",
        """
        time() - max by (namespace, run, phase, type) (alignment_trainer_last_checkpoint_timestamp_seconds{rank="0"}) > 3600
        and on (namespace, run, phase)
          max by (namespace, run, phase) (
            alignment_trainer_step{rank="0"} - alignment_trainer_checkpoint_step{rank="0"}
          ) > 1
        """,
        f"The last checkpoint of {PHASE} is {{{{ $value | humanizeDuration }}}} old",
        """The {{ $labels.type }} phase has gone on since; a failure now would cost all of that.""",
    ),
    Alert(
        "AlignmentThroughputHalved",
        "warning",
        "15m",
        f"""
        (
          {recent(SPEED)}
          < 0.5 * {earlier(SPEED)}
        )
        unless on (namespace, run, phase, pod)
        (
          {recent(ANY_LENGTH)}
          < 0.75 * {earlier(ANY_LENGTH)}
        )
        """,
        f"{first_up(PHASE)} is half as fast as it was",
        """The first process, in pod {{ $labels.pod }} ({{ $labels.type }}), does {{ $value | humanize }}
        tokens per second, less than half of its median over the last six hours, and its responses have not
        become shorter.""",
    ),
    Alert(
        "AlignmentGpuIdle",
        "warning",
        "15m",
        """
        avg by (namespace, run, phase, type) (avg_over_time(alignment_trainer_gpu_utilization_ratio[15m])) < 0.1
        and on (namespace, run, phase) max by (namespace, run, phase) (alignment_trainer_step) > 0
        """,
        f"The GPUs of {PHASE} are idle",
        """The GPUs of the {{ $labels.type }} phase have been at work {{ $value | humanizePercentage }} of the
        time for half an hour, on average over its processes, although it has begun its steps.""",
    ),
)

OPERATOR = (
    Alert(
        "AlignmentOperatorDown",
        "critical",
        "5m",
        f'absent(alignment_operator_info{{namespace="{OPERATOR_NAMESPACE}"}})',
        "The alignment operator in {{ $labels.namespace }} is down",
        """Prometheus sees no replica of the operator. Trainers that run go on; nothing new starts, nothing is
        retried, and no status changes.""",
    ),
    Alert(
        "AlignmentOperatorNoLeader",
        "critical",
        "3m",
        "max by (namespace) (alignment_operator_leader) == 0",
        "No replica of the alignment operator in {{ $labels.namespace }} acts",
        """Replicas run, but none holds the Lease alignment-operator, so nothing starts, nothing is retried,
        and no status changes.""",
    ),
    Alert(
        "AlignmentOperatorTwoLeaders",
        "critical",
        "3m",
        "count by (namespace) (max by (namespace, pod) (alignment_operator_leader) == 1) > 1",
        "{{ $value }} replicas of the alignment operator in {{ $labels.namespace }} act at once",
        """Only the one that holds the Lease may act. Two can start the same attempt; Kubernetes refuses the
        second job of a name, but statuses contradict each other.""",
    ),
    Alert(
        "AlignmentOperatorNotReconciling",
        "critical",
        "5m",
        """
        max by (namespace, pod) (alignment_operator_leader) == 1
        and on (pod) (
          sum by (pod) (alignment_operator_phase_state{state="Running"}) > 0
          or sum by (pod) (alignment_operator_workqueue_depth) > 0
          or (
            sum by (pod) (alignment_operator_watch_events_total{resource="alignmentruns"}) > 0
            unless on (pod) sum by (pod) (alignment_operator_reconcile_seconds_count)
          )
        )
        unless on (pod) sum by (pod) (increase(alignment_operator_reconcile_seconds_count[10m])) > 0
        """,
        "The alignment operator in {{ $labels.namespace }} looks at no run",
        """Replica {{ $labels.pod }} acts and there is work (phases that run are looked at every 15 seconds),
        but it has finished no look for ten minutes.""",
    ),
    Alert(
        "AlignmentOperatorReconcileErrors",
        "warning",
        "15m",
        """
        sum by (namespace, pod) (increase(alignment_operator_reconcile_seconds_count{outcome="bug"}[10m])) > 0
        """,
        "The alignment operator in {{ $labels.namespace }} meets an unexpected error",
        """Looks at a run have ended with an error that nobody foresaw, {{ $value | humanize }} times in ten
        minutes. That run does not go on; the others do. The log has the traceback.""",
    ),
    Alert(
        "AlignmentOperatorWatchDead",
        "warning",
        "0m",
        """
        max by (namespace, resource) (max_over_time(alignment_operator_watch_dead[15m])) == 1
        """,
        "A watch of {{ $labels.resource }} has died in the alignment operator in {{ $labels.namespace }}",
        """In the last fifteen minutes {{ $labels.resource }} changed and the watch said nothing. The kubelet
        restarts such a replica; if this goes on, restarting does not help.""",
    ),
    Alert(
        "AlignmentOperatorApiErrors",
        "warning",
        "10m",
        """
        (
          sum by (namespace, verb, resource) (
            rate(alignment_operator_api_requests_total{code=~"error|401|403|422|429|5.."}[10m])
          )
          / sum by (namespace, verb, resource) (rate(alignment_operator_api_requests_total[10m])) > 0.1
        )
        and
        sum by (namespace, verb, resource) (
          increase(alignment_operator_api_requests_total{code=~"error|401|403|422|429|5.."}[10m])
        ) > 5
        """,
        "{{ $value | humanizePercentage }} of the alignment operator's calls to {{ $labels.verb }} {{ $labels.resource }} fail",
        """The operator in {{ $labels.namespace }} is refused by the API server, or cannot reach it. It tries
        again, more and more slowly.""",
    ),
)

GROUPS = {"alignment-runs": RUNS, "alignment-training": TRAINING, "alignment-operator": OPERATOR}
ALERTS = tuple(alert for group in GROUPS.values() for alert in group)


def alerts_yaml() -> str:
    """The groups, as in a file of rules or the spec of a PrometheusRule."""
    groups = [{"name": name, "rules": _rules(alerts)} for name, alerts in GROUPS.items()]
    text = yaml.dump({"groups": groups}, Dumper=_Blocks, sort_keys=False, width=120)
    return f"# {NOTICE}\n{text}"


def _rules(alerts: Iterable[Alert]) -> list[Object]:
    return [alert.rule() for alert in alerts]


class _Blocks(yaml.SafeDumper):
    """Writes text of several lines as it is."""


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Blocks.add_representer(str, _text)

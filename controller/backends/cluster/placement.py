"""Where a job's pods go. Pure."""

from collections.abc import Mapping, Sequence
from typing import Any

from controller.api import meta
from controller.api.placement import NodeAffinity, PodAffinity
from controller.api.template import Template
from controller.plan.job import PhaseJob

Object = dict[str, Any]

UNREACHABLE = ("node.kubernetes.io/not-ready", "node.kubernetes.io/unreachable")
REQUIRED = "requiredDuringSchedulingIgnoredDuringExecution"
PREFERRED = "preferredDuringSchedulingIgnoredDuringExecution"


def placement(job: PhaseJob) -> Object:
    """The fields of a pod's spec that say it; those that nobody has set are left out."""
    template = job.template
    found: Object = {
        "tolerations": [*(t.document() for t in template.tolerations), *_lost_node_tolerations(template, job)],
        "nodeSelector": template.node_selector,
        "serviceAccountName": template.service_account_name,
        "priorityClassName": template.priority_class_name,
        "runtimeClassName": template.runtime_class_name,
        "schedulerName": template.scheduler_name,
        "affinity": _affinity(job),
        "topologySpreadConstraints": [
            {**spread.document(exclude={"match_labels"}), "labelSelector": _selector(spread.match_labels, job)}
            for spread in template.topology_spread_constraints or ()
        ],
    }
    return {name: value for name, value in found.items() if value}


def _lost_node_tolerations(template: Template, job: PhaseJob) -> list[Object]:
    """Kubernetes would wait five minutes before it gives up pods on a silent node."""
    given = {t.key for t in template.tolerations}
    return [
        {"key": key, "operator": "Exists", "effect": "NoExecute", "tolerationSeconds": job.node_lost_seconds}
        for key in UNREACHABLE
        if key not in given
    ]


def _affinity(job: PhaseJob) -> Object:
    given = job.template.affinity
    together = [pods for pods in given.pods if not pods.apart] if given else []
    apart = [pods for pods in given.pods if pods.apart] if given else []
    found = {
        "nodeAffinity": _nodes(given.nodes if given else (), job.avoid_nodes),
        "podAffinity": _pods(together, job),
        "podAntiAffinity": _pods(apart, job),
    }
    return {name: value for name, value in found.items() if value}


def _nodes(wanted: Sequence[NodeAffinity], avoided: Sequence[str]) -> Object:
    required = [node.expression for node in wanted if node.weight is None]
    preferred: list[Object] = [
        {"weight": node.weight, "preference": {"matchExpressions": [node.expression]}} for node in wanted if node.weight
    ]
    preferred += [_away_from(avoided)] if avoided else []
    return {
        **({REQUIRED: {"nodeSelectorTerms": [{"matchExpressions": required}]}} if required else {}),
        **({PREFERRED: preferred} if preferred else {}),
    }


def _away_from(nodes: Sequence[str]) -> Object:
    """Wished for, not demanded: where all nodes have failed once, or no other has room, one of them is better than none.

    By their names: a label says what a cloud or an administrator has written.
    """
    others = [{"key": "metadata.name", "operator": "NotIn", "values": [node]} for node in nodes]
    return {"weight": 100, "preference": {"matchFields": others}}


def _pods(wanted: Sequence[PodAffinity], job: PhaseJob) -> Object:
    required = [_term(pods, job) for pods in wanted if pods.weight is None]
    preferred = [{"weight": pods.weight, "podAffinityTerm": _term(pods, job)} for pods in wanted if pods.weight]
    return {**({REQUIRED: required} if required else {}), **({PREFERRED: preferred} if preferred else {})}


def _term(pods: PodAffinity, job: PhaseJob) -> Object:
    return {"topologyKey": pods.topology_key, "labelSelector": _selector(pods.match_labels, job)}


def _selector(labels: Mapping[str, str] | None, job: PhaseJob) -> Object:
    """To Kubernetes an absent one means no pods, which nobody wants."""
    own = (meta.LABEL_RUN, meta.LABEL_PHASE, meta.LABEL_ATTEMPT)
    return {"matchLabels": labels or {label: job.labels[label] for label in own}}

"""kwok Stages that make the pods on fake nodes do what a test says.

A pod of a PyTorchJob or Job runs for a second and succeeds; other pods run for ever. Annotations
``test.alignment.dev/<key>`` say otherwise, or, where a test reaches a pod only through its containers' environment,
variables ``TEST_POD_<KEY>`` of its first container; ``TEST_POD_<KEY>_<N>`` holds for attempt N alone (label
``alignment.dev/attempt``). The keys:

    outcome     succeed (default); fail; evict, as under memory pressure; pending, never starts; forever, never ends;
                lost, never ends and stays Terminating when deleted, as on a node that has died
    seconds     how long it runs: a Go duration, such as 2s or 300ms
    exit_code   of a failing pod, default 1
    reason      of a failing pod's containers, default Error; OOMKilled, for example
    message     the termination message of the containers, whatever the outcome
"""

from typing import Any

PREFIX = "test.alignment.dev"

Stage = dict[str, Any]


def pod_stages() -> list[Stage]:
    others = ("pending", "fail", "evict", "forever", "lost")
    evicted = _ended("Failed", "137", '"Error"', _EVICTED, _DISRUPTED)
    return [
        _stage("start", "Pending", ("NotIn", "pending"), _running()),
        _stage("succeed", "Running", ("NotIn", *others), _ended("Succeeded", "0", '"Completed"'), of_job=True),
        _stage("fail", "Running", ("In", "fail"), _ended("Failed", "$exit_code", "$reason"), of_job=True),
        _stage("evict", "Running", ("In", "evict"), evicted, of_job=True),
        _delete_stage(),
    ]


def _stage(name: str, phase: str, outcome: tuple[str, ...], status: str, of_job: bool = False) -> Stage:
    """Pods in ``phase`` whose outcome is (not) one of some get ``status``; those of a job after their seconds."""
    matches: list[dict[str, Any]] = [
        {"key": ".metadata.deletionTimestamp", "operator": "DoesNotExist"},
        {"key": ".status.phase", "operator": "In", "values": [phase]},
        {"key": _query("outcome"), "operator": outcome[0], "values": list(outcome[1:])},
    ]
    spec: dict[str, Any] = {"next": {"statusTemplate": status}}
    if of_job:
        matches.append({"key": ".metadata.ownerReferences.[].kind", "operator": "In", "values": ["Job", "PyTorchJob"]})
        spec["delay"] = {"durationMilliseconds": 1000, "durationFrom": {"expressionFrom": _query("seconds")}}
    return _pod_stage(name, matches, spec)


def _delete_stage() -> Stage:
    matches: list[dict[str, Any]] = [
        {"key": ".metadata.deletionTimestamp", "operator": "Exists"},
        {"key": ".metadata.finalizers", "operator": "DoesNotExist"},
        {"key": _query("outcome"), "operator": "NotIn", "values": ["lost"]},
    ]
    return _pod_stage("delete", matches, {"next": {"delete": True}})


def _pod_stage(name: str, matches: list[dict[str, Any]], spec: dict[str, Any]) -> Stage:
    return {
        "apiVersion": "kwok.x-k8s.io/v1alpha1", "kind": "Stage", "metadata": {"name": f"pod-{name}"},
        "spec": {"resourceRef": {"apiGroup": "v1", "kind": "Pod"}, "selector": {"matchExpressions": matches}, **spec},
    }  # fmt: skip


def _query(key: str) -> str:
    """jq for a key's value: the annotation, the variable for this attempt, the variable."""
    variable = f"TEST_POD_{key.upper()}"
    of_attempt = '"' + variable + r'_\(.metadata.labels["alignment.dev/attempt"] // "")"'
    return " // ".join(
        [
            f'.metadata.annotations["{PREFIX}/{key}"]',
            f"({of_attempt} as $name | [.spec.containers[0].env[]? | select(.name == $name) | .value][0])",
            f'([.spec.containers[0].env[]? | select(.name == "{variable}") | .value][0])',
        ]
    )


def _assign(key: str, default: str) -> str:
    """The same value as a template's variable."""
    variable = f"TEST_POD_{key.upper()}"
    look = (
        '{{ range index (index .spec.containers 0) "env" }}{{ if eq .name NAME }}{{ $KEY = .value }}{{ end }}{{ end }}'
    )
    return (
        f"{{{{ ${key} := {default} }}}}\n"
        + look.replace("KEY", key).replace("NAME", f'"{variable}"')
        + look.replace("KEY", key).replace("NAME", f'(printf "{variable}_%v" $attempt)')
        + f'{{{{ with index $annotations "{PREFIX}/{key}" }}}}{{{{ ${key} = . }}}}{{{{ end }}}}\n'
    )


_PREAMBLE = """{{ $now := Now }}
{{ $annotations := or .metadata.annotations dict }}
{{ $attempt := or (index (or .metadata.labels dict) "alignment.dev/attempt") "" }}
"""


def _running() -> str:
    return (
        _PREAMBLE
        + """phase: Running
startTime: {{ $now | Quote }}
hostIP: {{ NodeIPWith .spec.nodeName | Quote }}
podIP: {{ PodIPWith .spec.nodeName false .metadata.uid .metadata.name .metadata.namespace | Quote }}
conditions:
{{ range $type := list "PodReadyToStartContainers" "Initialized" "Ready" "ContainersReady" }}
- {type: {{ $type }}, status: "True", lastTransitionTime: {{ $now | Quote }}}
{{ end }}
containerStatuses:
{{ range .spec.containers }}
- {name: {{ .name | Quote }}, image: {{ .image | Quote }}, ready: true, started: true, restartCount: 0,
   state: {running: {startedAt: {{ $now | Quote }}}}}
{{ end }}
"""
    )


# As the kubelet leaves a pod that it evicts under memory pressure.
_EVICTED = """reason: Evicted
message: "The node was low on resource: memory. Threshold quantity: 100Mi, available: 60Mi."
"""
_DISRUPTED = """- type: DisruptionTarget
  status: "True"
  reason: TerminationByKubelet
  lastTransitionTime: {{ $now | Quote }}
"""
_CONDITIONS = """conditions:
{{ range $type := list "Ready" "ContainersReady" }}
- {type: {{ $type }}, status: "False", reason: PodCompleted, lastTransitionTime: {{ $now | Quote }}}
{{ end }}
"""
_CONTAINERS = """containerStatuses:
{{ $started := .status.startTime }}
{{ range .spec.containers }}
- name: {{ .name | Quote }}
  image: {{ .image | Quote }}
  ready: false
  started: false
  restartCount: 0
  state:
    terminated:
      exitCode: {{ EXIT_CODE }}
      reason: {{ REASON | Quote }}
      message: {{ $message | Quote }}
      startedAt: {{ $started | Quote }}
      finishedAt: {{ $now | Quote }}
{{ end }}
"""


def _ended(phase: str, exit_code: str, reason: str, status: str = "", conditions: str = "") -> str:
    values = _assign("exit_code", '"1"') + _assign("reason", '"Error"') + _assign("message", '""')
    containers = _CONTAINERS.replace("EXIT_CODE", exit_code).replace("REASON", reason)
    return f"{_PREAMBLE}{values}phase: {phase}\n{status}{containers}{_CONDITIONS}{conditions}"

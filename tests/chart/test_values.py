"""The chart's values: each is described, each changes something, and what cannot be is refused by name."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from chart.helm import CHART, NAME, HelmError, Object, helm, template
from generate.chart import Undocumented, Value, read_values, values_schema
from trainers import __version__

ON = {"enabled": True}
DIGEST = f"sha256:{'0' * 64}"


def walk(values: list[Value]) -> Any:
    for value in values:
        yield value
        yield from walk(value.members)


VALUES = list(walk(read_values((CHART / "values.yaml").read_text())))


OTHER: dict[str, Any] = {
    **dict.fromkeys(("interval", "scrapeTimeout"), "7s"),
    **{key: [{"name": "x"}] for key in ("imagePullSecrets", "extraEnv")},
    **{key: [{"x": "y"}] for key in ("tolerations", "relabelings", "metricRelabelings")},
    **{key: [{"namespaceSelector": {}}] for key in ("from", "metricsFrom")},
    "topologySpreadConstraints": [],
    "limits": [{"name": "x", "namespaces": ["x"], "maxNodes": 1}],
    "pullPolicy": "Never", "digest": DIGEST, "logFormat": "text", "logLevel": "debug", "size": "9Gi",
    "backend": "TrainJob", "runbooks": "https://example.com", "apiServerPorts": [1], "watchNamespaces": ["a"], "run": {"seed": 7},
    "resources": {"limits": {"cpu": 1}}, "extraObjects": ["{kind: X, metadata: {name: x}}"],
}  # fmt: skip
"""By the value's name; others are turned, counted up, or made `x`."""


def other(value: Value) -> Any:
    name, default = value.path.rpartition(".")[2], value.default
    if name in OTHER:
        return OTHER[name]
    if isinstance(default, bool):
        return not default
    if isinstance(default, int):
        return default + 1
    return "x" if isinstance(default, str) else {"x": "y"}


def text_of(*layers: Object) -> str:
    flags = [
        flag for layer in layers for flag in ("--set-json", ",".join(f"{k}={json.dumps(v)}" for k, v in layer.items()))
    ]
    return helm("template", NAME, str(CHART), *flags)


def switched(path: str) -> Object:
    """What has to be on for a value to matter; the two ways to scrape the operator are never on at once."""
    way = "serviceMonitor" if "serviceMonitor" in path else "podMonitor"
    monitors = (way, "trainersPodMonitor", "prometheusRule", "dashboards")
    return {
        **{f"monitoring.{name}.enabled": True for name in monitors if f"monitoring.{name}.enabled" != path},
        **({} if path == "networkPolicy.egress.restrict" else {"networkPolicy.egress.restrict": True}),
    }


@pytest.mark.parametrize("value", [v for v in VALUES if not v.members], ids=lambda v: v.path)
def test_every_value_changes_something(value: Value) -> None:
    switches = switched(value.path)
    assert text_of(switches, {value.path: other(value)}) != text_of(switches)


@pytest.mark.parametrize("value", VALUES, ids=lambda v: v.path)
def test_every_value_is_described_in_the_readme(value: Value) -> None:
    text = (CHART / "README.md").read_text()
    assert f"`{value.path}`" in text or f"### {value.path}\n" in text
    assert value.description in text.replace("\\\\", "\\")


def test_a_value_without_a_description_or_a_type_is_an_error() -> None:
    with pytest.raises(Undocumented, match=r"line 1: a has no description above it"):
        read_values("a: 1\n")
    with pytest.raises(Undocumented, match=r"a.b needs an entry in generate.chart.RULES"):
        values_schema(read_values("# A.\na:\n  # B.\n  b: []\n"))


BAD = {
    "an unknown value": ({"replicas": 2}, "additional properties 'replicas' not allowed"),
    "one in a group": ({"image": {"name": "x"}}, "at '/image': additional properties 'name' not allowed"),
    "a text for a number": ({"replicaCount": "two"}, "at '/replicaCount': got string, want integer"),
    "too few": ({"workers": 0}, "at '/workers': minimum: got 0, want 1"),
    "a level that is none": ({"logLevel": "loud"}, "at '/logLevel': value must be one of 'debug', 'info'"),
    "a namespace that cannot be": ({"watchNamespaces": ["Team A"]}, "at '/watchNamespaces/0': 'Team A' does not match"),
    "one namespace twice": ({"watchNamespaces": ["a", "a"]}, "at '/watchNamespaces': items at 0 and 1 are equal"),
    "a text for a list": ({"watchNamespaces": "a,b"}, "at '/watchNamespaces': got string, want array"),
    "a label that is a number": ({"commonLabels": {"a": 1}}, "at '/commonLabels/a': got number, want string"),
    "a tag in the repository": ({"image": {"repository": "x:1"}}, "at '/image/repository': 'x:1' does not match"),
    "a registry with a protocol": (
        {"global": {"imageRegistry": "https://x.example"}}, "at '/global/imageRegistry': 'https://x.example' does not match"
    ),
    "a name that cannot be": ({"nameOverride": "Bad_Name"}, "at '/nameOverride': 'Bad_Name' does not match"),
    "another": ({"fullnameOverride": "UPPER"}, "at '/fullnameOverride': 'UPPER' does not match"),
    "a label with a space": (
        {"commonLabels": {"foo bar": "x"}}, "at '/commonLabels': additional properties 'foo bar' not allowed"
    ),
    "a label's value with a space": ({"podLabels": {"x": "a b"}}, "at '/podLabels/x': 'a b' does not match"),
    "an amount with a unit that is none": (
        {"resources": {"requests": {"memory": "128MB"}}}, "at '/resources/requests/memory': '128MB' does not match"
    ),
    "an amount of what nobody knows": (
        {"resources": {"limits": {"mem": "1Gi"}}}, "at '/resources/limits': additional properties 'mem' not allowed"
    ),
    "more than all": (
        {"podDisruptionBudget": {"maxUnavailable": "150%"}}, "at '/podDisruptionBudget/maxUnavailable': '150%' does not match"
    ),
    "half a digest": ({"image": {"digest": "sha256:12"}}, "at '/image/digest': 'sha256:12' does not match"),
    "a variable without a name": ({"extraEnv": [{"value": "x"}]}, "at '/extraEnv/0': missing property 'name'"),
    "variables as a map": ({"extraEnv": {"A": "b"}}, "at '/extraEnv': got object, want array"),
    "a time without a unit": ({"monitoring": {"podMonitor": {"interval": "30"}}}, "at '/monitoring/podMonitor/interval'"),
    "a switch that is a word": ({"crds": {"keep": "yes"}}, "at '/crds/keep': got string, want boolean"),
    "a queue that cannot be": ({"defaults": {"queue": "GPUs"}}, "at '/defaults/queue': 'GPUs' does not match"),
    "limits for nobody": ({"limits": [{"name": "x", "maxNodes": 1}]}, "at '/limits/0': 'oneOf' failed"),
    "limits of what nobody knows": (
        {"limits": [{"name": "x", "namespaces": ["x"], "gpus": 1}]}, "at '/limits/0': additional properties 'gpus' not allowed"
    ),
    "an asterisk within": (
        {"limits": [{"name": "x", "namespaces": ["x"], "images": ["a*b"]}]}, "at '/limits/0/images/0': 'a*b' does not match"
    ),
    "a largest run of what a pod need not name": (
        {"limits": [{"name": "x", "namespaces": ["x"], "largestRun": {"cpu": 8}}]},
        "at '/limits/0/largestRun': additional properties 'cpu' not allowed",
    ),
    "a largest run of namespaces by their labels": (
        {"limits": [{"name": "x", "namespaceSelector": {"matchLabels": {"a": "b"}}, "largestRun": {"nodes": 8}}]},
        "limits of x: largestRun needs namespaces by name",
    ),
    "two limits of one name": (
        {"limits": [{"name": "a", "namespaces": ["x"], "maxNodes": 1}, {"name": "a", "namespaces": ["b"], "maxNodes": 2}]},
        "limits: two have the name a",
    ),
    "a peer that selects by a word": (
        {"networkPolicy": {"trainers": {"metricsFrom": [{"namespaceSelector": "foo"}]}}},
        "at '/networkPolicy/trainers/metricsFrom/0/namespaceSelector': got string, want object",
    ),
    "a peer that is nobody": ({"networkPolicy": {"from": [{}]}}, "at '/networkPolicy/from/0': minProperties: got 0, want 1"),
    "a peer by address and name": (
        {"networkPolicy": {"from": [{"podSelector": {}, "ipBlock": {"cidr": "10.0.0.0/8"}}]}},
        "at '/networkPolicy/from/0': maxProperties: got 2, want 1",
    ),
    "both ways to scrape": (
        {"monitoring": {"podMonitor": ON, "serviceMonitor": ON}},
        "monitoring.podMonitor.enabled and monitoring.serviceMonitor.enabled are both true",
    ),
    "a test where nobody looks": (
        {"watchNamespaces": ["a", "b"], "test": {"namespace": "c"}},
        "test.namespace is c, which is not one of watchNamespaces (a, b)",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_values_are_refused_with_their_name(case: str) -> None:
    values, message = BAD[case]
    with pytest.raises(HelmError, match=re.escape(message)):
        template(values)


def test_a_chart_around_this_one_can_switch_it_and_share_globals(tmp_path: Path) -> None:
    dependency = {"name": NAME, "version": __version__, "repository": f"file://{CHART}", "condition": f"{NAME}.enabled"}
    chart = {"apiVersion": "v2", "name": "around", "version": "1.0.0", "dependencies": [dependency]}
    (tmp_path / "Chart.yaml").write_text(yaml.safe_dump(chart))
    (tmp_path / "values.yaml").write_text(yaml.safe_dump({"global": {"theirs": 1}, NAME: {"enabled": True}}))
    helm("dependency", "update", str(tmp_path))
    assert "kind: Deployment" in helm("template", "x", str(tmp_path))
    assert "kind: Deployment" not in helm("template", "x", str(tmp_path), "--set", f"{NAME}.enabled=false")

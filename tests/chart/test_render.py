"""What Helm makes of the chart: valid for every Kubernetes it is meant for, and what each value changes."""

import json
import re
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml
from cluster import build
from cluster.assets import locate

from chart.helm import CHART, NAME, NAMESPACE, HelmError, Object, helm, one, template
from controller.api import meta
from controller.api.run import AlignmentRun
from controller.gen.alerts import OPERATOR_NAMESPACE
from controller.gen.chart import Undocumented, Value, read_values, values_schema
from controller.gen.crd import crd
from controller.gen.rbac import granted
from controller.preflight import load_run
from trainers import __version__

KUBERNETES = ("1.32", "1.33", "1.34", "1.35", "1.36")
MONITORS = ("podMonitor", "trainersPodMonitor", "prometheusRule", "dashboards")
ON = {"enabled": True}
DIGEST = f"sha256:{'0' * 64}"

EVERYTHING: Object = {
    "global": {"imageRegistry": "registry.example.com/mirror/", "imagePullSecrets": [{"name": "registry"}]},
    "commonLabels": {"team": "alignment"},
    "image": {"digest": DIGEST, "pullPolicy": "Always"},
    "watchNamespaces": ["team-a", "team-b"],
    "defaults": {"trainerImage": {"tag": "2.0"}, "workspaceClaim": "work", "queue": "gpus"},
    "logFormat": "text",
    "logLevel": "debug",
    "workers": 16,
    "watchdogSeconds": 30.5,
    "extraEnv": [{"name": "A", "value": "b"}, {"name": "C", "valueFrom": {"fieldRef": {"fieldPath": "spec.nodeName"}}}],
    "replicaCount": 3,
    "deploymentAnnotations": {"d": "1"},
    "podAnnotations": {"p": "1"},
    "podLabels": {"l": "1"},
    "priorityClassName": "system-cluster-critical",
    "nodeSelector": {"kubernetes.io/os": "linux"},
    "tolerations": [{"key": "control-plane", "operator": "Exists"}],
    "affinity": {"podAntiAffinity": {"preferredDuringSchedulingIgnoredDuringExecution": []}},
    "podDisruptionBudget": {"maxUnavailable": "50%"},
    "serviceAccount": {"name": "somebody", "annotations": {"a": "b"}},
    "crds": {"keep": False},
    "networkPolicy": {"from": [{"namespaceSelector": {}}], "egress": {"restrict": True, "apiServerPorts": [8443]}},
    "monitoring": {
        **{
            name: {"enabled": True, "namespace": "monitoring", "labels": {"release": "x"}, "annotations": {"a": "b"}}
            for name in MONITORS
        },
        "prometheusRule": {"enabled": True, "runbooks": "https://example.com/runbooks/"},
    },
    "test": {"namespace": "team-b", "timeoutSeconds": 60, "claim": {"size": "5Gi", "storageClassName": "fast"}},
    "extraObjects": [
        {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "{{ .Release.Name }}-one"}},
        "apiVersion: v1\nkind: ConfigMap\nmetadata: {name: two}",
    ],
}
MATRIX: dict[str, Object] = {
    "as it comes": {},
    "everything": EVERYTHING,
    "little": {
        "replicaCount": 1,
        "rbac": {"create": False, "aggregate": False},
        "serviceAccount": {"create": False},
        "crds": {"enabled": False},
        "networkPolicy": {"enabled": False},
        "podDisruptionBudget": {"enabled": False},
        "topologySpreadConstraints": [],
        "defaults": {"trainerImage": {"repository": ""}},
        "resources": None,
        "podSecurityContext": None,
        "securityContext": None,
    },
    "monitors": {"monitoring": dict.fromkeys(MONITORS, ON)},
    "service": {"monitoring": {"serviceMonitor": {**ON, "interval": "1m30s", "scrapeTimeout": "10s",
                                                  "relabelings": [{"action": "labeldrop", "regex": "x"}]}}},
    "names": {"nameOverride": "align", "fullnameOverride": "a" * 60},
}  # fmt: skip


@pytest.fixture(scope="module", params=MATRIX)
def rendered(request: pytest.FixtureRequest) -> list[Object]:
    return template(MATRIX[request.param])


def test_lint_is_content() -> None:
    assert "0 chart(s) failed" in helm("lint", "--strict", str(CHART))


@pytest.mark.parametrize("version", KUBERNETES)
def test_every_object_is_one_of_that_kubernetes(rendered: list[Object], version: str) -> None:
    assert len(rendered) > 5
    for document in rendered:
        group = document["apiVersion"].split("/")[0]
        if group not in ("monitoring.coreos.com", meta.GROUP):
            kubernetes_validate.validate(document, version, strict=True)


@pytest.mark.parametrize("wrong", [{"replicas": "two"}, {"replicaCount": 2}])
def test_those_schemas_refuse_what_is_wrong(wrong: Object) -> None:
    deployment = one(template(), "Deployment")
    deployment["spec"] |= wrong
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(deployment, KUBERNETES[-1], strict=True)


def test_the_oldest_kubernetes_that_is_supported_is_said() -> None:
    with pytest.raises(HelmError, match=r"requires kubeVersion: >=1\.30"):
        template({}, "--kube-version", "1.29.0")


def test_objects_that_are_namespaced_say_where_and_names_are_unique(rendered: list[Object]) -> None:
    wide = ("ClusterRole", "ClusterRoleBinding", "CustomResourceDefinition")
    for document in rendered:
        if not document["metadata"]["name"].endswith(("-one", "two")):
            assert (document["kind"] in wide) == ("namespace" not in document["metadata"]), document["metadata"]
    keys = [(d["kind"], d["metadata"].get("namespace"), d["metadata"]["name"]) for d in rendered]
    assert len(keys) == len(set(keys))
    assert max(len(name) for _, _, name in keys) <= 63


# ---------------------------------------------------------------- values


def walk(values: list[Value]) -> Any:
    for value in values:
        yield value
        yield from walk(value.members)


VALUES = list(walk(read_values((CHART / "values.yaml").read_text())))


OTHER: dict[str, Any] = {
    **dict.fromkeys(("interval", "scrapeTimeout"), "7s"),
    **{key: [{"name": "x"}] for key in ("imagePullSecrets", "extraEnv")},
    **{key: [{"x": "y"}] for key in ("tolerations", "relabelings", "metricRelabelings", "from")},
    "topologySpreadConstraints": [],
    "pullPolicy": "Never", "digest": DIGEST, "logFormat": "text", "logLevel": "debug", "size": "9Gi",
    "runbooks": "https://example.com", "apiServerPorts": [1], "watchNamespaces": ["a"], "run": {"seed": 7},
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
    with pytest.raises(Undocumented, match=r"a.b needs an entry in controller.gen.chart.RULES"):
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


# ---------------------------------------------------------------- what values change


def container(objects: list[Object]) -> Object:
    return one(objects, "Deployment")["spec"]["template"]["spec"]["containers"][0]


def environment(objects: list[Object]) -> dict[str, str]:
    return {item["name"]: item.get("value", "") for item in container(objects)["env"]}


def images(objects: list[Object]) -> set[str]:
    """Of containers, and the trainers' default."""
    pods = [o["spec"] for o in objects if o["kind"] == "Pod"]
    pods += [o["spec"]["template"]["spec"] for o in objects if o["kind"] == "Deployment"]
    return {c["image"] for pod in pods for c in pod["containers"]} | {environment(objects)["DEFAULT_TRAINER_IMAGE"]}


def test_images_and_their_registry() -> None:
    assert images(template()) == {f"alignment-operator:{__version__}", f"alignment-trainer:{__version__}"}
    moved = template({"global": {"imageRegistry": "r.example.com/m/"}, "image": {"registry": "docker.io"}})
    assert images(moved) == {
        f"r.example.com/m/alignment-operator:{__version__}", f"r.example.com/m/alignment-trainer:{__version__}"
    }  # fmt: skip
    own = template({"image": {"registry": "quay.io", "tag": "x", "digest": DIGEST}})
    assert f"quay.io/alignment-operator@{DIGEST}" in images(own)


def test_the_operator_is_told_by_its_environment_what_its_options_are() -> None:
    """Every variable is one that the program knows."""
    known = set(re.findall(r'envvar="(\w+)"', (CHART.parents[1] / "controller/__main__.py").read_text()))
    found = environment(template(EVERYTHING))
    assert known - {"PORT"} <= found.keys()
    assert {k: v for k, v in found.items() if k in known - {"POD_NAMESPACE"}} == {
        "WATCH_NAMESPACES": "team-a team-b", "DEFAULT_WORKSPACE_CLAIM": "work", "DEFAULT_QUEUE": "gpus",
        "DEFAULT_TRAINER_IMAGE": "registry.example.com/mirror/alignment-trainer:2.0", "LOG_FORMAT": "text",
        "LOG_LEVEL": "debug", "WORKERS": "16", "WATCHDOG_SECONDS": "30.5",
    }  # fmt: skip
    assert not {"WATCH_NAMESPACES", "DEFAULT_QUEUE", "DEFAULT_WORKSPACE_CLAIM"} & environment(template()).keys()


def test_rights_are_those_of_the_calls() -> None:
    wide = template()
    assert one(wide, "ClusterRole", NAME)["rules"] == granted()["operator"]
    assert one(wide, "Role", f"{NAME}-leader")["rules"] == granted()["leader"]
    assert one(wide, "Role", f"{NAME}-test")["rules"] == granted()["test"]


def test_listed_namespaces_have_roles_and_the_cluster_none() -> None:
    listed = template({"watchNamespaces": ["a", "b"], "rbac": {"aggregate": False}})
    assert not [o for o in listed if o["kind"] in ("ClusterRole", "ClusterRoleBinding")]
    for namespace in ("a", "b"):
        [role] = [o for o in listed if o["kind"] == "Role" and o["metadata"]["namespace"] == namespace and
                  o["metadata"]["name"] == NAME]  # fmt: skip
        assert role["rules"] == granted()["operator"]
    bindings = [o for o in listed if o["kind"] == "RoleBinding"]
    assert {s["namespace"] for b in bindings for s in b["subjects"]} == {NAMESPACE}
    assert one(template(EVERYTHING), "Pod")["metadata"]["namespace"] == NAMESPACE


def test_the_crd_is_the_generated_one_and_kept_unless_told() -> None:
    for keep, policy in ((True, {"helm.sh/resource-policy": "keep"}), (False, None)):
        found = one(template({"crds": {"keep": keep}}), "CustomResourceDefinition")
        assert found["spec"] == crd()["spec"]
        assert (found["metadata"].get("annotations") or None) == policy
    assert not [o for o in template({"crds": {"enabled": False}}) if o["kind"] == "CustomResourceDefinition"]


def test_pods_are_fit_for_the_restricted_level() -> None:
    """As Kubernetes' documentation has it, written out here; the life cycle has it enforced."""
    objects = template()
    for pod in (one(objects, "Pod")["spec"], one(objects, "Deployment")["spec"]["template"]["spec"]):
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        for one_of in pod["containers"]:
            assert one_of["securityContext"] == {
                "allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]}
            }  # fmt: skip
        assert {next(k for k in v if k != "name") for v in pod["volumes"]} <= {"emptyDir", "configMap"}


def test_a_replica_that_waits_for_a_kind_is_not_restarted() -> None:
    """It is not ready then, so only readiness may ask for that: the kubelet ends what does not start."""
    operator = container(template({}))
    asks = {probe: operator[probe]["httpGet"]["path"] for probe in operator if probe.endswith("Probe")}
    assert asks == {"startupProbe": "/healthz", "livenessProbe": "/healthz", "readinessProbe": "/readyz"}


def test_the_network_policy_lets_in_what_asks_for_the_port_that_probes_and_monitors_use() -> None:
    """Whether it is enforced is the network plugin's affair, and the test cluster's does not."""
    objects = template(EVERYTHING)
    policy, pods = one(objects, "NetworkPolicy")["spec"], one(objects, "Deployment")["spec"]["template"]
    assert policy["podSelector"]["matchLabels"].items() <= pods["metadata"]["labels"].items()
    [rule] = policy["ingress"]
    [port] = rule["ports"]
    operator = pods["spec"]["containers"][0]
    assert port["port"] in [p["name"] for p in operator["ports"]]
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert operator[probe]["httpGet"]["port"] == port["port"]
    assert one(objects, "PodMonitor", NAME)["spec"]["podMetricsEndpoints"][0]["port"] == port["port"]
    assert policy["policyTypes"] == ["Ingress", "Egress"]
    api, dns, trainers = policy["egress"]
    assert ([p["port"] for p in api["ports"]], {p["port"] for p in dns["ports"]}) == ([8443], {53})
    assert trainers["to"][0]["podSelector"]["matchLabels"] == {meta.LABEL_MANAGED_BY: meta.PRODUCT}
    assert one(template(), "NetworkPolicy")["spec"]["policyTypes"] == ["Ingress"]


def test_selectors_find_the_operators_pods_and_no_others() -> None:
    objects = template({**EVERYTHING, "monitoring": {"serviceMonitor": ON}})
    labels = one(objects, "Deployment")["spec"]["template"]["metadata"]["labels"]
    tests = one(objects, "Pod")["metadata"]["labels"]
    selectors = [
        one(objects, "Deployment")["spec"]["selector"]["matchLabels"],
        one(objects, "PodDisruptionBudget")["spec"]["selector"]["matchLabels"],
        one(objects, "Service")["spec"]["selector"],
        one(objects, "ServiceMonitor")["spec"]["selector"]["matchLabels"],
    ]
    for selector in selectors:
        assert selector.items() <= labels.items()
        assert not selector.items() <= tests.items()
    assert one(objects, "ServiceMonitor")["spec"]["selector"]["matchLabels"].items() <= (
        one(objects, "Service")["metadata"]["labels"].items()
    )


def test_a_rename_does_not_change_who_is_selected_by_the_trainers_monitor() -> None:
    spec = one(template({"monitoring": {"trainersPodMonitor": ON}}), "PodMonitor", f"{NAME}-trainers")["spec"]
    assert spec["selector"]["matchLabels"] == {meta.LABEL_MANAGED_BY: meta.PRODUCT}
    assert spec["namespaceSelector"] == {"any": True}
    [endpoint] = spec["podMetricsEndpoints"]
    assert not {"port", "targetPort", "portNumber"} & endpoint.keys()
    regex = endpoint["relabelings"][0]["regex"]
    assert [bool(re.fullmatch(regex, port)) for port in ("metrics", "metrics-1", "metrics-63", "http", "metrics-x")] == [
        True, True, True, False, False,
    ]  # fmt: skip
    listed = one(template(EVERYTHING), "PodMonitor", f"{NAME}-trainers")
    assert listed["spec"]["namespaceSelector"] == {"matchNames": ["team-a", "team-b"]}
    assert (listed["metadata"]["namespace"], listed["metadata"]["labels"]["release"]) == ("monitoring", "x")


def test_alerts_are_the_generated_ones_and_link_to_the_runbooks() -> None:
    text = (CHART / "files/alerts.yaml").read_text()
    groups = yaml.safe_load(text.replace(OPERATOR_NAMESPACE, "alignment-system"))["groups"]
    linked = one(template(EVERYTHING), "PrometheusRule")["spec"]["groups"]
    alerts = [rule for group in linked for rule in group["rules"] if "alert" in rule]
    assert alerts
    for rule in alerts:
        assert rule["annotations"]["runbook_url"] == f"https://example.com/runbooks/{rule['alert']}.md"
    plain = one(template({"monitoring": {"prometheusRule": ON}}), "PrometheusRule")["spec"]["groups"]
    for group in groups:
        for rule in group["rules"]:
            rule.get("annotations", {}).pop("runbook_url", None)
    assert plain == groups


def test_dashboards_are_the_generated_ones() -> None:
    files = sorted((CHART / "files/dashboards").glob("*.json"))
    assert files
    found = {
        name: (text, o["metadata"])
        for o in template({"monitoring": {"dashboards": ON}}) if o["kind"] == "ConfigMap"
        for name, text in o["data"].items() if name.endswith(".json")
    }  # fmt: skip
    assert {name: text for name, (text, _) in found.items()} == {f.name: f.read_text().rstrip("\n") for f in files}
    for _, metadata in found.values():
        assert metadata["labels"]["grafana_dashboard"] == "1"


@pytest.mark.parametrize("case", ["everything", "monitors", "service"])
def test_monitors_are_of_the_prometheus_operators_kinds(case: str) -> None:
    """Its own CRDs' schemas, in which unknown fields are errors here."""
    kinds = {
        k["spec"]["names"]["kind"]: k["spec"]["versions"][0]["schema"]["openAPIV3Schema"]
        for k in json.loads(build.ensure("monitoring").manifest("prometheus-operator").read_text())
    }
    checked = [o for o in template(MATRIX[case]) if o["apiVersion"] == "monitoring.coreos.com/v1"]
    assert checked
    for document in checked:
        jsonschema.validate(document, closed(kinds[document["kind"]]))


def closed(schema: Any) -> Any:
    if isinstance(schema, list):
        return [closed(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    found = {key: closed(value) for key, value in schema.items()}
    fields = schema.get("properties")
    # Kubernetes itself knows the fields of metadata; they are not in a CRD.
    if isinstance(fields, dict) and schema.get("type") == "object" and "metadata" not in fields:
        found.setdefault("additionalProperties", False)
    if str(schema.get("pattern", "")).startswith("^(?i)"):  # Go's way to write it, an error here
        del found["pattern"]
    return found


# ---------------------------------------------------------------- helm test


def smoke_run(values: Object) -> AlignmentRun:
    objects = template(values)
    [text] = [o["data"]["run.yaml"] for o in objects if o["kind"] == "ConfigMap" and "run.yaml" in o["data"]]
    return load_run(yaml.safe_load(text))


def test_the_tests_run_is_valid_and_takes_what_it_is_given() -> None:
    plain = smoke_run({})
    assert plain.spec.workspace is not None
    assert plain.spec.workspace.claim_name == plain.name == f"{NAME}-test"
    run = {"workspace": {"uri": "s3://b/p"}, "template": {"resources": {"limits": {"cpu": 1}}}}
    own = smoke_run({"test": {"run": run}})
    assert own.spec.workspace is not None
    assert (own.spec.workspace.uri, own.spec.template.resources is None) == ("s3://b/p", False)
    assert not [o for o in template({"test": {"run": run}}) if o["kind"] == "PersistentVolumeClaim"]
    assert smoke_run({"watchNamespaces": ["a", "b"]}).metadata.namespace == "a"
    assert len(smoke_run({"fullnameOverride": "x" * 60}).name) <= meta.RUN_NAME_LENGTH


def test_all_that_the_test_makes_is_a_hook_that_goes_away() -> None:
    with_tests = {(o["kind"], o["metadata"]["name"]) for o in template()}
    without = {(o["kind"], o["metadata"]["name"]) for o in template({}, "--skip-tests")}
    hooks = [o for o in template() if "helm.sh/hook" in (o["metadata"].get("annotations") or {})]
    assert {(o["kind"], o["metadata"]["name"]) for o in hooks} == with_tests - without
    for hook in hooks:
        assert hook["metadata"]["annotations"]["helm.sh/hook-delete-policy"] == "before-hook-creation,hook-succeeded"


# ---------------------------------------------------------------- Chart.yaml


def test_the_charts_metadata_is_that_of_the_project() -> None:
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    assert (chart["version"], chart["appVersion"]) == (__version__, __version__)
    hub = {key.removeprefix("artifacthub.io/"): value for key, value in chart["annotations"].items()}
    assert {item["image"] for item in yaml.safe_load(hub["images"])} == images(template())
    [kind] = yaml.safe_load(hub["crds"])
    assert (kind["kind"], kind["version"], kind["name"]) == (meta.KIND, meta.VERSION, crd()["metadata"]["name"])
    for example in yaml.safe_load(hub["crdsExamples"]):
        load_run(example)
    assert (CHART / "LICENSE").read_text() == (CHART.parents[1] / "LICENSE").read_text()


def test_the_package_holds_no_more_than_it_needs(tmp_path: Path) -> None:
    import tarfile

    helm("package", str(CHART), "--destination", str(tmp_path))
    with tarfile.open(tmp_path / f"{NAME}-{__version__}.tgz") as tar:
        names = {name.removeprefix(f"{NAME}/") for name in tar.getnames()}
    tops = {name.split("/")[0] for name in names}
    assert tops == {"Chart.yaml", "LICENSE", "README.md", "files", "templates", "values.schema.json", "values.yaml"}
    assert locate().binary("helm").exists()

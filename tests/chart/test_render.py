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
from controller.operator.largest import largest_runs
from controller.preflight import load_run
from generate.alerts import OPERATOR_NAMESPACE
from generate.crd import crd
from generate.rbac import granted
from trainers import __version__

KUBERNETES = ("1.32", "1.33", "1.34", "1.35", "1.36")
MONITORS = ("podMonitor", "trainersPodMonitor", "prometheusRule", "dashboards")
POLICIES = ("ValidatingAdmissionPolicy", "ValidatingAdmissionPolicyBinding")
ON = {"enabled": True}
DIGEST = f"sha256:{'0' * 64}"

EVERYTHING: Object = {
    "global": {"imageRegistry": "registry.example.com/mirror/", "imagePullSecrets": [{"name": "registry"}]},
    "commonLabels": {"team": "alignment"},
    "image": {"digest": DIGEST, "pullPolicy": "Always"},
    "watchNamespaces": ["team-a", "team-b"],
    "limits": [
        {
            "name": "a",
            "namespaces": ["team-a"],
            "images": ["a/*"],
            "nodeSelector": {"pool": ["a"]},
            "maxNodes": 4,
            "largestRun": {"nodes": 2_000_000, "nvidia.com/gpu": 64},
        },
        {
            "name": "b",
            "namespaceSelector": {"matchLabels": {"tenant": "b"}},
            "claims": [],
            "secrets": [],
            "queues": ["b"],
        },
    ],
    "defaults": {"trainerImage": {"tag": "2.0"}, "workspaceClaim": "work", "queue": "gpus", "backend": "TrainJob"},
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
    "networkPolicy": {
        "from": [{"namespaceSelector": {}}],
        "egress": {"restrict": True, "apiServerPorts": [8443]},
        "trainers": {"metricsFrom": [{"ipBlock": {"cidr": "10.0.0.0/8"}}]},
    },
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
    wide = ("ClusterRole", "ClusterRoleBinding", "CustomResourceDefinition", *POLICIES)
    for document in rendered:
        if not document["metadata"]["name"].endswith(("-one", "two")):
            assert (document["kind"] in wide) == ("namespace" not in document["metadata"]), document["metadata"]
    keys = [(d["kind"], d["metadata"].get("namespace"), d["metadata"]["name"]) for d in rendered]
    assert len(keys) == len(set(keys))
    assert max(len(name) for _, _, name in keys) <= 63


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
        "LOG_LEVEL": "debug", "WORKERS": "16", "WATCHDOG_SECONDS": "30.5", "TRAINER_USER": "1000",
        "DEFAULT_BACKEND": "TrainJob", "METRICS_READERS": found["METRICS_READERS"], "LARGEST_RUNS": found["LARGEST_RUNS"],
    }  # fmt: skip
    assert not {"WATCH_NAMESPACES", "DEFAULT_QUEUE", "DEFAULT_WORKSPACE_CLAIM"} & environment(template()).keys()


def test_the_operator_is_told_how_large_runs_may_be() -> None:
    told = largest_runs(environment(template(EVERYTHING))["LARGEST_RUNS"])
    assert told == {"team-a": {"nodes": 2_000_000, "nvidia.com/gpu": 64}}
    assert "LARGEST_RUNS" not in environment(template({"limits": [{"name": "a", "namespaces": ["a"], "maxNodes": 1}]}))


def test_metrics_of_trainers_are_for_the_operator_and_whom_the_values_list() -> None:
    operator, prometheus = json.loads(environment(template(EVERYTHING))["METRICS_READERS"])
    assert prometheus == {"ipBlock": {"cidr": "10.0.0.0/8"}}
    assert operator["namespaceSelector"]["matchLabels"] == {"kubernetes.io/metadata.name": NAMESPACE}
    labels = one(template(EVERYTHING), "Deployment")["spec"]["template"]["metadata"]["labels"]
    assert operator["podSelector"]["matchLabels"].items() <= labels.items()
    assert environment(template())["METRICS_READERS"] == "[]", "everybody"
    assert "METRICS_READERS" not in environment(template({"networkPolicy": {"trainers": {"enabled": False}}}))


def test_rights_are_those_of_the_calls() -> None:
    wide = template()
    assert one(wide, "ClusterRole", NAME)["rules"] == [*granted()["operator"], *granted()["walls"]]
    without = template({"networkPolicy": {"trainers": {"enabled": False}}})
    assert one(without, "ClusterRole", NAME)["rules"] == granted()["operator"]
    assert one(wide, "Role", f"{NAME}-leader")["rules"] == granted()["leader"]
    assert one(wide, "Role", f"{NAME}-test")["rules"] == granted()["test"]


def test_listed_namespaces_have_roles_and_the_cluster_none() -> None:
    listed = template({"watchNamespaces": ["a", "b"], "rbac": {"aggregate": False}})
    assert not [o for o in listed if o["kind"] in ("ClusterRole", "ClusterRoleBinding")]
    for namespace in ("a", "b"):
        [role] = [o for o in listed if o["kind"] == "Role" and o["metadata"]["namespace"] == namespace and
                  o["metadata"]["name"] == NAME]  # fmt: skip
        assert role["rules"] == [*granted()["operator"], *granted()["walls"]]
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


def test_pods_that_only_have_the_trainers_labels_are_not_scraped() -> None:
    [endpoint] = one(template({"monitoring": {"trainersPodMonitor": ON}}), "PodMonitor", f"{NAME}-trainers")["spec"][
        "podMetricsEndpoints"
    ]
    kept = {tuple(r["sourceLabels"]): r["regex"] for r in endpoint["relabelings"] if r["action"] == "keep"}
    regex = kept["__meta_kubernetes_pod_controller_kind",]
    assert [bool(re.fullmatch(regex, kind)) for kind in ("PyTorchJob", "Job", "ReplicaSet")] == [True, True, False]


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

"""What docs/operations.md says is what the code does."""

import ast
import re
from pathlib import Path

import pytest
import yaml
from chart import helm

from controller.api import meta
from controller.api.status import QueueState
from controller.operator.events import TYPES
from generate.alerts import ALERTS
from generate.rbac import granted
from operations.page import PAGE, ROOT, files, rows
from trainers.contract import FAILURES

PLAN = sorted((ROOT / "controller/plan").glob("*.py"))
GROUPS = {"": "core"}


def said_reasons() -> set[str]:
    """Every reason that the planner gives a condition: the second argument of each Claim."""
    found: set[str] = set()
    for path in PLAN:
        for call in ast.walk(ast.parse(path.read_text())):
            if isinstance(call, ast.Call) and getattr(call.func, "id", "") == "Claim":
                reason = next((k.value for k in call.keywords if k.arg == "reason"), None) or call.args[1]
                found |= _values(reason)
    return found


def _values(node: ast.expr) -> set[str]:
    """Of an expression that ends in constants of meta, states of the queue, or another claim's reason."""
    names = [n for n in ast.walk(node) if isinstance(n, ast.Attribute)]
    constants = {getattr(meta, n.attr) for n in names if getattr(n.value, "id", "") == "meta" and n.attr.isupper()}
    if any(n.attr == "state" or getattr(n.value, "id", "") == "QueueState" for n in names):
        constants |= {state.value for state in QueueState}
    passed_on = any(n.attr == "reason" for n in names)
    assert constants - {meta.SUCCEEDED, meta.FAILED} or passed_on, ast.dump(node)
    return constants


def declared_reasons() -> set[str]:
    """The constants of meta.py that are reasons."""
    source = Path(meta.__file__).read_text().split("# ---- condition reasons")[1]
    return {getattr(meta, name) for name in re.findall(r"^([A-Z_]+) = ", source, re.MULTILINE)}


def test_every_reason_of_a_condition_is_in_the_table_and_no_other():
    told = [row[1].strip("`") for row in rows("Conditions")]
    assert len(told) == len(set(told))
    assert set(told) == said_reasons() == declared_reasons() | {state.value for state in QueueState}


def test_every_event_is_in_the_table_with_its_type():
    assert {row[0].strip("`"): row[1] for row in rows("Events")} == TYPES


def test_every_row_has_a_command():
    for table in ("Conditions", "Failures of a phase", "The operator itself"):
        for row in rows(table):
            assert re.fullmatch(r"`(kubectl|helm) .*`", row[-1]), row


def test_every_class_of_failure_is_told_of_and_whether_it_is_tried_again():
    told = {row[0].strip("`"): row[2] for row in rows("Failures of a phase")}
    assert set(told) == set(FAILURES)
    for failure, facts in FAILURES.items():
        assert facts.retryable == told[failure].endswith("yes") or failure == "Internal", failure


def test_rights_are_those_that_are_granted():
    told: dict[str, set[tuple[str, str, str]]] = {}
    for who, group, resource, verbs, _ in rows("Security"):
        told.setdefault(who.split(",")[0], set()).add((group, resource, verbs))
    found = granted()
    in_namespaces = _triples(found["operator"]) | _triples(found["walls"]) | _triples(found["leader"])
    assert told["the operator"] == in_namespaces
    assert told["`helm test`"] == _triples(found["test"])
    assert told["view"] == _triples(found["people"]["view"]["rules"])
    assert told["edit"] == _triples(found["people"]["edit"]["rules"])
    assert len(rows("Security")) == len(in_namespaces) + 3


def _triples(rules) -> set[tuple[str, str, str]]:
    return {
        (GROUPS.get(group, group), resource, ", ".join(rule["verbs"]))
        for rule in rules for group in rule["apiGroups"] for resource in rule["resources"]
    }  # fmt: skip


@pytest.mark.parametrize("name", ["values.yaml", "monitoring.yaml", "limits.yaml"])
def test_values_that_are_shown_are_accepted(name):
    rendered = helm.template(yaml.safe_load(files()[name]))
    assert rendered


def test_images_and_monitors_are_where_the_values_say():
    values = yaml.safe_load(files()["values.yaml"]) | yaml.safe_load(files()["monitoring.yaml"])
    rendered = helm.template(values)
    deployment = helm.one(rendered, "Deployment")
    [container] = deployment["spec"]["template"]["spec"]["containers"]
    assert container["image"] == "registry.example.com/alignment-operator:0.1.0"
    rules = helm.one(rendered, "PrometheusRule")
    base = values["monitoring"]["prometheusRule"]["runbooks"]
    links = [r["annotations"]["runbook_url"] for group in rules["spec"]["groups"] for r in group["rules"]]
    assert links == [f"{base}/{alert.name}.md" for alert in ALERTS]


def test_alertmanager_is_told_of_alerts_that_exist():
    text = files()["alertmanager.yaml"]
    assert yaml.safe_load(text)["inhibit_rules"]
    names = [alert.name for alert in ALERTS]
    for pattern in re.findall(r'alertname=~?"([^"]+)"', text):
        assert any(re.fullmatch(pattern, name) for name in names), pattern
    targets = re.findall(r'target_matchers: \[alertname=~?"([^"]+)"', text)
    assert sum(bool(re.fullmatch(targets[1], name)) for name in names) == 3


def test_links_lead_somewhere():
    headings = {re.sub(r"[^a-z0-9 -]", "", h.lower()).replace(" ", "-") for h in re.findall(r"^#+ (.*)$", PAGE, re.M)}
    for target in re.findall(r"\]\(([^)]+)\)", PAGE):
        path, _, anchor = target.partition("#")
        assert not path or (ROOT / "docs" / path).exists(), target
        assert path or anchor in headings, target
    for name in re.findall(r"`((?:controller|trainers|configs|manifests|docs|tests|helm)/[\w/.-]+)`", PAGE):
        assert (ROOT / name).exists(), name

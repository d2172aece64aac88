"""`make scan`: Checkov, a third party's scanner, over what the chart and the operator make. What it finds has a reason here."""

import json
import subprocess
from pathlib import Path

import yaml

from chart.helm import ROOT, Object, template
from controller.api.run import AlignmentRun
from controller.backends.cluster import pytorchjob, trainjob
from controller.backends.cluster.kind import Owner
from controller.backends.cluster.settings import Settings
from controller.plan.job import build_job
from controller.plan.resolve import resolve

CHECKOV = "checkov==3.3.30"

REASONS = {
    ("CKV_K8S_11", "Deployment"): "a burst of runs takes what is free; the request keeps its share (docs/operations.md, Sizing)",
    ("CKV_K8S_11", "Pod"): "`helm test` is one short process; what trains is limited by its run (template.resources)",
    ("CKV_K8S_13", "Pod"): "what trains asks for what its run says (template.resources)",
    ("CKV_K8S_15", "Deployment"): "tags are releases, which do not change; image.pullPolicy sets it",
    ("CKV_K8S_15", "Pod"): "tags are releases, which do not change; image.pullPolicy and template.imagePullPolicy set it",
    ("CKV_K8S_38", "Deployment"): "the operator talks to the API server",
    ("CKV_K8S_38", "Pod"): "`helm test` makes a run; trainers' pods have no token",
    ("CKV_K8S_40", "Deployment"): "it writes to no volume that another user shares; podSecurityContext sets it",
    ("CKV_K8S_40", "Pod"): "files in a workspace are this user's; defaults.userID and template.securityContext set it",
    ("CKV_K8S_43", "Deployment"): "image.digest sets it; a registry of the user's own has other digests than ours",
    ("CKV_K8S_43", "Pod"): "image.digest and defaults.trainerImage.digest set it",
    ("CKV_K8S_8", "Pod"): "it runs once and ends; the operator watches progress (failurePolicy.stallTimeoutSeconds)",
    ("CKV_K8S_9", "Pod"): "nothing is sent to it",
    ("CKV2_K8S_6", "Pod"): "`helm test` listens on nothing; trainers' pods have the policy that the operator makes for their run",
}  # fmt: skip
"""By check and kind."""

EVERYTHING: Object = {
    "limits": [{"name": "a", "namespaces": ["a"], "images": ["a/*"], "nodeSelector": {"pool": ["a"]}, "maxNodes": 4}],
    "networkPolicy": {"egress": {"restrict": True}},
    "monitoring": {name: {"enabled": True} for name in ("podMonitor", "trainersPodMonitor", "prometheusRule")},
}


def test_what_is_found_has_a_reason_and_reasons_are_needed(tmp_path: Path):
    (tmp_path / "chart.yaml").write_text(yaml.safe_dump_all(template(EVERYTHING)))
    (tmp_path / "trainer.yaml").write_text(yaml.safe_dump_all(trainers()))
    for name in ("operator", "rbac", "namespace"):
        (tmp_path / f"{name}.yaml").write_text((ROOT / f"manifests/base/{name}.yaml").read_text())
    found = scanned(tmp_path)
    new = {key: where for key, where in found.items() if key not in REASONS}
    assert not new, f"mend these, or write a reason: {new}"
    assert set(REASONS) == set(found), "a reason that nothing needs"


def trainers() -> list[Object]:
    """Pods as their controllers make them of the samples' jobs, of both kinds."""
    pods = []
    for name in ("minimal", "two-nodes"):
        run = AlignmentRun.model_validate(yaml.safe_load((ROOT / f"manifests/samples/{name}.yaml").read_text()))
        job = build_job(run, resolve(run)[0], 1, "digest", {}, (), alone=True)
        made = (job, Owner("runs", run.name, "uid", f"runs.{run.name}"), Settings("alignment-trainer:0.1.0"))
        of_a_set = trainjob.runtime(*made)["spec"]["template"]["spec"]["replicatedJobs"][0]["template"]
        workers = {
            "worker-0": pytorchjob.render(*made)["spec"]["pytorchReplicaSpecs"]["Worker"]["template"],
            "node-0-0": of_a_set["spec"]["template"],
        }
        for place, pod in workers.items():
            pod["metadata"] |= {"name": f"{job.name}-{place}", "namespace": "runs"}
            pods.append({"apiVersion": "v1", "kind": "Pod", **pod})
    return pods


def scanned(folder: Path) -> dict[tuple[str, str], str]:
    """Check and kind to the check's own words."""
    command = [str(ROOT / ".venv/bin/uv"), "tool", "run", "--from", CHECKOV, "checkov", "--directory", str(folder)]
    command += ["--framework", "kubernetes", "--compact", "--skip-download", "--soft-fail", "--output", "json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=600)
    results = json.loads(done.stdout)["results"]
    assert len(results["passed_checks"]) > 200, "it has looked"
    return {
        (check["check_id"], check["resource"].split(".")[0]): f"{check['check_name']}: {check['resource']}"
        for check in results["failed_checks"]
    }

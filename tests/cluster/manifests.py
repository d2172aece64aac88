"""The controllers' own manifests, rendered once into the cache, and what changes where they run as plain processes."""

import json
import subprocess
from pathlib import Path
from typing import Any

import yaml

from cluster.assets import Assets

_FOLDERS = {"training-operator": "manifests/overlays/standalone", "kueue": "config/default"}
# The processes are not in pods and use the administrator's kubeconfig.
_NOT_FOR_PROCESSES = {
    "Deployment", "Service", "ServiceAccount", "APIService", "ConfigMap",
    "Role", "RoleBinding", "ClusterRole", "ClusterRoleBinding",
}  # fmt: skip
_OTHER_JOBS = {f"{kind}jobs.kubeflow.org" for kind in ("jax", "mpi", "paddle", "tf", "xgboost")}
_STAGES = (
    "node/fast/node-initialize",
    "node/heartbeat-with-lease/node-heartbeat-with-lease",
)

Document = dict[str, Any]


def needed(tier: str) -> list[str]:
    if tier == "s3":
        return []
    return ["training-operator", "kueue", *(["kwok"] if tier == "kwok" else [])]


def render(name: str, assets: Assets, source: Path) -> None:
    """Written as JSON, which loads in a fraction of the time that YAML takes."""
    if name == "kwok":
        text = "\n---\n".join((source / "kustomize" / "stage" / f"{stage}.yaml").read_text() for stage in _STAGES)
    else:
        command = [str(assets.binary("kubectl")), "kustomize", str(source / _FOLDERS[name])]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    documents = [document for document in yaml.safe_load_all(text) if document]
    out = assets.manifest(name)
    out.parent.mkdir(parents=True, exist_ok=True)
    part = out.with_suffix(".part")
    part.write_text(json.dumps(documents))
    part.replace(out)


def for_process(path: Path, url: str, certificates: dict[str, str]) -> list[Document]:
    """The documents for a controller whose webhooks listen at ``url`` with ``certificates`` (base64, as in a Secret)."""
    kept = [document for document in json.loads(path.read_text()) if _is_kept(document)]
    for document in kept:
        if document["kind"] == "Secret":
            document["data"] = certificates
        for client in _webhook_clients(document):
            client["url"] = url + client.pop("service").get("path", "")
            client["caBundle"] = certificates["ca.crt"]
    return kept


def _is_kept(document: Document) -> bool:
    return document["kind"] not in _NOT_FOR_PROCESSES and document["metadata"]["name"] not in _OTHER_JOBS


def _webhook_clients(document: Document) -> list[Document]:
    conversion = document.get("spec", {}).get("conversion", {})
    clients = [hook["clientConfig"] for hook in document.get("webhooks", [])]
    return clients + ([conversion["webhook"]["clientConfig"]] if "webhook" in conversion else [])

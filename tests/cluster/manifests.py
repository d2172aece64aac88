"""The controllers' own manifests, rendered once into the cache, and what changes where they run as plain processes."""

import json
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import yaml

from cluster.assets import Assets

_FOLDERS = {
    "training-operator": "manifests/overlays/standalone", "kueue": "config/default", "jobset": "config/default",
    "trainer-controller-manager": "manifests/overlays/manager",
}  # fmt: skip
_CONTROLLERS = list(_FOLDERS)
# Trainer's manifests would fetch a release of JobSet's.
_ELSEWHERE = "third-party/jobset"
# The processes are not in pods and use the administrator's kubeconfig.
_NOT_FOR_PROCESSES = {
    "Deployment", "Service", "ServiceAccount", "APIService", "ConfigMap",
    "Role", "RoleBinding", "ClusterRole", "ClusterRoleBinding",
}  # fmt: skip
_OTHER_JOBS = {f"{kind}jobs.kubeflow.org" for kind in ("jax", "mpi", "paddle", "tf", "xgboost")}
_FILES = {
    "kwok": (
        "kustomize/stage/node/fast/node-initialize.yaml",
        "kustomize/stage/node/heartbeat-with-lease/node-heartbeat-with-lease.yaml",
    ),
    "prometheus-operator": ("example/prometheus-operator-crd/*.yaml",),
}

Document = dict[str, Any]


class _Loader(yaml.CSafeLoader):
    """Reads a plain ``=`` as the text it is: PyYAML knows no value for it, and matchers have it."""


_Loader.add_constructor("tag:yaml.org,2002:value", yaml.CSafeLoader.construct_yaml_str)


def needed(tier: str) -> list[str]:
    alone = {"s3": [], "chart": [], "monitoring": ["prometheus-operator"]}
    return alone.get(tier, [*_CONTROLLERS, *(["kwok"] if tier == "kwok" else [])])


def render(name: str, assets: Assets, source: Path) -> None:
    """Written as JSON, which loads in a fraction of the time that YAML takes."""
    if name in _FILES:
        files = [file for pattern in _FILES[name] for file in sorted(source.glob(pattern))]
        text = "\n---\n".join(file.read_text() for file in files)
    else:
        text = _kustomized(assets, source, _FOLDERS[name])
    documents = [document for document in yaml.load_all(text, _Loader) if document]
    out = assets.manifest(name)
    out.parent.mkdir(parents=True, exist_ok=True)
    part = out.with_suffix(".part")
    part.write_text(json.dumps(documents))
    part.replace(out)


def _kustomized(assets: Assets, source: Path, folder: str) -> str:
    """From a copy of all around it, less what would be fetched from elsewhere."""
    top = folder.split("/", maxsplit=1)[0]
    with tempfile.TemporaryDirectory() as place:
        shutil.copytree(source / top, Path(place) / top, copy_function=shutil.copyfile)
        for path in [Path(place), *Path(place).rglob("*")]:
            path.chmod(0o755)
        listed = Path(place) / folder / "kustomization.yaml"
        kept = [line for line in listed.read_text().splitlines() if _ELSEWHERE not in line]
        listed.write_text("\n".join(kept))
        command = [str(assets.binary("kubectl")), "kustomize", str(listed.parent)]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout


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

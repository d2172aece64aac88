"""This project on a test cluster: its two images, the installed operator, and a namespace to run in.

The trainers' packages (torch and its friends, several GB) come into pods through a read-only claim on this
environment's site-packages; the image holds the project alone.
"""

import hashlib
import json
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

from cluster.assets import Assets, cache_home
from cluster.client import Cluster
from cluster.images import Layer, write_image
from cluster.locks import exclusive

ROOT = Path(__file__).resolve().parents[2]
OPERATOR_IMAGE = "alignment-operator:test"
TRAINER_IMAGE = "alignment-trainer:test"
SHIPPED_IMAGE = "alignment-operator:0.1.0"
"""As manifests/operator.yaml names it."""
SYSTEM = "alignment-system"
ENVIRONMENT = "/opt/environment"
USER = 1000

Object = dict[str, Any]


def operator_image(assets: Assets, out: Path) -> Path:
    layers = [Layer(controller_packages(), "/opt/packages"), *_source()]
    environment = {"PYTHONPATH": "/app:/opt/packages", "PYTHONDONTWRITEBYTECODE": "1"}
    return write_image(
        OPERATOR_IMAGE, layers, out, base=assets.image("python"), user=str(USER), env=environment, workdir="/"
    )


def trainer_image(assets: Assets, out: Path) -> Path:
    environment = {"PYTHONPATH": f"/app:{ENVIRONMENT}", "PYTHONDONTWRITEBYTECODE": "1"}
    return write_image(
        TRAINER_IMAGE, _source(), out, base=assets.image("python"), user=str(USER), env=environment, workdir="/"
    )


def _source() -> list[Layer]:
    return [Layer(ROOT / name, f"/app/{name}") for name in ("controller", "trainers")]


def controller_packages() -> Path:
    """What the controller needs and no more, from its lock; made once for each state of the lock."""
    lock = ROOT / "requirements" / "controller.lock"
    folder = cache_home() / f"controller-{hashlib.sha256(lock.read_bytes()).hexdigest()[:12]}"
    with exclusive(folder.with_suffix(".lock"), "another process installs the controller's packages", print):
        if not folder.exists():
            part = folder.with_suffix(".part")
            shutil.rmtree(part, ignore_errors=True)
            command = [str(Path(sys.executable).parent / "uv"), "pip", "install", "--quiet", "--no-deps"]
            command += ["--require-hashes", "--target", str(part), "-r", str(lock)]
            subprocess.run(command, check=True, cwd=ROOT)
            part.replace(folder)
    return folder


def load_images(cluster: Cluster, assets: Assets) -> None:
    for make in (operator_image, trainer_image):
        archive = make(assets, cluster.state / f"{make.__name__}.tar")
        cluster.load_image(archive)
        archive.unlink()


def install(cluster: Cluster) -> None:
    """`kubectl apply --server-side -k manifests`, with the image that was loaded."""
    manifests = cluster.kubectl("kustomize", str(ROOT / "manifests"))
    assert SHIPPED_IMAGE in manifests
    cluster.apply(manifests.replace(SHIPPED_IMAGE, OPERATOR_IMAGE))
    cluster.kubectl("rollout", "status", "-n", SYSTEM, "deployment/alignment-operator", "--timeout=90s", timeout=100)


def prepare(cluster: Cluster, namespace: str) -> Path:
    """Claims `workspace` and `environment` in a namespace. Returns the folder that is the workspace."""
    folder = cluster.state / "workspaces" / namespace
    folder.mkdir(parents=True)
    folder.chmod(0o777)
    packages = sysconfig.get_paths()["purelib"]
    cluster.apply(
        [*_claim(namespace, "workspace", str(folder), "ReadWriteMany"),
         *_claim(namespace, "environment", packages, "ReadOnlyMany")]
    )  # fmt: skip
    return folder


def _claim(namespace: str, name: str, path: str, mode: str) -> list[Object]:
    """A claim on a folder of this machine, which every node sees."""
    volume = f"{namespace}-{name}"
    size = {"storage": "20Gi"}
    return [
        {"apiVersion": "v1", "kind": "PersistentVolume", "metadata": {"name": volume},
         "spec": {"capacity": size, "accessModes": [mode], "hostPath": {"path": path}, "storageClassName": "",
                  "persistentVolumeReclaimPolicy": "Retain", "claimRef": {"namespace": namespace, "name": name}}},
        {"apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": {"name": name, "namespace": namespace},
         "spec": {"accessModes": [mode], "storageClassName": "", "volumeName": volume,
                  "resources": {"requests": size}}},
    ]  # fmt: skip


def template(**more: Any) -> Object:
    """`spec.template` for runs in a prepared namespace."""
    return {
        "image": TRAINER_IMAGE,
        "claims": [{"claimName": "environment", "mountPath": ENVIRONMENT}],
        "env": [{"name": "OMP_NUM_THREADS", "value": "1"}],
        **more,
    }


def run_manifest(namespace: str, name: str, spec: Object, **template_fields: Any) -> str:
    """An AlignmentRun as text, with the workspace and template of a prepared namespace."""
    document = {
        "apiVersion": "alignment.dev/v1alpha1",
        "kind": "AlignmentRun",
        "metadata": {"name": name, "namespace": namespace},
        "spec": {"workspace": {"claimName": "workspace"}, "template": template(**template_fields), **spec},
    }
    return json.dumps(document)

"""The product on a test cluster: its images from the working tree, and the volumes that its runs use."""

import hashlib
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

from cluster.assets import Assets, cache_home
from cluster.images import Layer, write_image
from cluster.locks import exclusive

ROOT = Path(__file__).parents[2]
OPERATOR, TRAINER = "alignment-operator:test", "alignment-trainer:test"
WORKSPACE_CLAIM, ENVIRONMENT_CLAIM = "alignment", "trainer-environment"
ENVIRONMENT_PATH = "/opt/environment"
TEMPLATE = {"image": TRAINER, "claims": [{"claimName": ENVIRONMENT_CLAIM, "mountPath": ENVIRONMENT_PATH}]}
"""For a run's `spec.template`: torch and the rest are too large for an image made anew with each change."""

_SOURCE = "/opt/alignment"
_DEPENDENCIES = "/opt/dependencies"


def operator_image(assets: Assets, out: Path) -> Path:
    """Named `OPERATOR`: the packages of requirements/controller.lock, and the source."""
    layers = [Layer(_dependencies(), _DEPENDENCIES, exclude=()), *_source()]
    env = {"PYTHONPATH": f"{_SOURCE}:{_DEPENDENCIES}", "PYTHONUNBUFFERED": "1"}
    return write_image(OPERATOR, layers, out, assets.image("python"), user="1000", env=env, workdir=_SOURCE)


def trainer_image(assets: Assets, out: Path) -> Path:
    """Named `TRAINER`: the source alone; its packages come by the claim `ENVIRONMENT_CLAIM`."""
    env = {"PYTHONPATH": f"{_SOURCE}:{ENVIRONMENT_PATH}", "PYTHONUNBUFFERED": "1"}
    return write_image(TRAINER, _source(), out, assets.image("python"), user="1000", env=env, workdir=_SOURCE)


def claims(namespace: str, workspace: Path) -> list[dict[str, Any]]:
    """A writable workspace in a folder of this machine, and this interpreter's packages, read-only."""
    workspace.mkdir(parents=True, exist_ok=True)
    workspace.chmod(0o777)  # fsGroup does not reach volumes of this kind
    packages = Path(sysconfig.get_path("purelib"))
    return [
        *_claim(namespace, WORKSPACE_CLAIM, workspace, "ReadWriteMany"),
        *_claim(namespace, ENVIRONMENT_CLAIM, packages, "ReadOnlyMany"),
    ]


def _claim(namespace: str, name: str, folder: Path, mode: str) -> list[dict[str, Any]]:
    """Claim and volume bound to each other. The restricted level refuses such a path in a pod, not behind a claim."""
    volume = f"{namespace}-{name}"
    spec = {"accessModes": [mode], "storageClassName": ""}
    return [
        {
            "apiVersion": "v1", "kind": "PersistentVolume", "metadata": {"name": volume},
            "spec": spec | {
                "capacity": {"storage": "100Gi"}, "hostPath": {"path": str(folder)},
                "persistentVolumeReclaimPolicy": "Retain", "claimRef": {"namespace": namespace, "name": name},
            },
        },
        {
            "apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": {"name": name, "namespace": namespace},
            "spec": spec | {"volumeName": volume, "resources": {"requests": {"storage": "1Gi"}}},
        },
    ]  # fmt: skip


def _source() -> list[Layer]:
    return [Layer(ROOT / package, f"{_SOURCE}/{package}") for package in ("controller", "trainers")]


def _dependencies() -> Path:
    """Installed once for each state of the lock."""
    lock = ROOT / "requirements" / "controller.lock"
    key = hashlib.sha256(lock.read_bytes() + sys.version.encode()).hexdigest()
    folder = cache_home() / "operator-dependencies" / key[:12]
    with exclusive(folder.with_name("lock"), "another process is installing the operator's packages; waiting for it"):
        if not folder.exists():
            for old in folder.parent.glob("[0-9a-f]*"):
                shutil.rmtree(old)
            scratch = folder.with_name("part")
            shutil.rmtree(scratch, ignore_errors=True)
            _install(scratch, lock)
            scratch.rename(folder)
    return folder


def _install(folder: Path, lock: Path) -> None:
    uv = [str(Path(sys.executable).with_name("uv")), "pip", "install", "--quiet", "--target", str(folder)]
    wanted = ["--no-deps", "--require-hashes", "-r", str(lock)]
    subprocess.run([*uv, "--python", sys.executable, *wanted], check=True)
    # Layers have no modification times, so bytecode must not be compared with them.
    compiled = ["-m", "compileall", "-q", "--invalidation-mode", "unchecked-hash", str(folder)]
    subprocess.run([sys.executable, *compiled], check=False, stdout=subprocess.DEVNULL)

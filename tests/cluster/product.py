"""The product on a test cluster: its images from the working tree, and the volumes that its runs use."""

import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cluster import buildah
from cluster.assets import Assets
from cluster.images import Layer, write_image
from trainers import __version__

ROOT = Path(__file__).parents[2]
OPERATOR, TRAINER = "alignment-operator:test", "alignment-trainer:test"
WORKSPACE_CLAIM, ENVIRONMENT_CLAIM = "alignment", "trainer-environment"
SHIPPED_TRAINER = f"alignment-trainer:{__version__}"
ENVIRONMENT_PATH = "/opt/environment"
TEMPLATE = {"image": TRAINER, "claims": [{"claimName": ENVIRONMENT_CLAIM, "mountPath": ENVIRONMENT_PATH}]}
"""For a run's `spec.template`: torch and the rest are too large for an image made anew with each change."""

_SOURCE = "/opt/alignment"


def operator_image(assets: Assets, out: Path) -> Path:
    """Named `OPERATOR`, from controller/Dockerfile."""
    with operator_store(assets) as store:
        return store.export(OPERATOR, out)


def operator_image_of(tree: Path, name: str, assets: Assets, out: Path) -> Path:
    """The same from another tree than the working one, such as an older version's."""
    with buildah.store("operator", assets.image("python"), ["build", "controller"]) as store:
        store.build("operator", name, tree=tree)
        return store.export(name, out)


@contextmanager
def operator_store(assets: Assets) -> Iterator[buildah.Store]:
    """With the image `OPERATOR` of the working tree in it."""
    with buildah.store("operator", assets.image("python"), ["build", "controller"]) as store:
        store.build("operator", OPERATOR)
        yield store


@contextmanager
def trainers_store(assets: Assets) -> Iterator[buildah.Store]:
    """With `SHIPPED_TRAINER` in it, from trainers/Dockerfile: several GB, so only for the trial of that image."""
    with buildah.store("trainers", assets.image("python"), ["build", "torch", "runtime"]) as store:
        store.build("trainer", SHIPPED_TRAINER)
        yield store


def trainer_image(assets: Assets, out: Path, tree: Path = ROOT, name: str = TRAINER) -> Path:
    """The source alone; its packages come by the claim `ENVIRONMENT_CLAIM`."""
    env = {"PYTHONPATH": f"{_SOURCE}:{ENVIRONMENT_PATH}", "PYTHONUNBUFFERED": "1"}
    return write_image(name, _source(tree), out, assets.image("python"), user="1000", env=env, workdir=_SOURCE)


def claims(namespace: str, workspace: Path) -> list[dict[str, Any]]:
    """A writable workspace in a folder of this machine, and this interpreter's packages, read-only."""
    workspace.mkdir(parents=True, exist_ok=True)
    workspace.chmod(0o777)  # fsGroup does not reach volumes of this kind
    packages = Path(sysconfig.get_path("purelib"))
    return [
        *claim(namespace, WORKSPACE_CLAIM, workspace, "ReadWriteMany"),
        *claim(namespace, ENVIRONMENT_CLAIM, packages, "ReadOnlyMany"),
    ]


def claim(namespace: str, name: str, folder: Path, mode: str) -> list[dict[str, Any]]:
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


def _source(tree: Path) -> list[Layer]:
    return [Layer(tree / package, f"{_SOURCE}/{package}") for package in ("controller", "trainers")]

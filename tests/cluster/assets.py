"""Where binaries, manifests and images lie: a folder given by the user, or a cache keyed by the pinned versions."""

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent
MODULES = ("kube", "kueue", "prometheus-operator")
PINS = (
    "pins.txt",
    *(f"{module}/go.{kind}" for module in MODULES for kind in ("mod", "sum")),
    "prometheus-operator/discovery/main.go",
)
FORMAT = b"1"  # raise it when build.py or manifests.py write something else for the same pins
GIVEN = "ALIGNMENT_CLUSTER_ASSETS"

API = ("etcd", "kube-apiserver", "kubectl", "kube-controller-manager", "training-operator.v1", "kueue")
BINARIES = {
    "api": API,
    "kwok": (*API, "kube-scheduler", "kwok"),
    "node": (*API, "kube-scheduler", "kubelet", "kube-proxy", "coredns"),
    "s3": ("versitygw",),
    "monitoring": ("prometheus-operator", "prometheus-discovery"),
    "chart": ("helm",),
}


@dataclass(frozen=True)
class Assets:
    """``bin/``, ``manifests/`` and ``images/`` under one root; ``given`` ones are complete and never written to."""

    root: Path
    given: bool = False

    def binary(self, name: str) -> Path:
        return self.root / "bin" / name

    def manifest(self, name: str) -> Path:
        return self.root / "manifests" / f"{name}.json"

    def image(self, name: str) -> Path:
        return self.root / "images" / f"{name}.tar"

    def missing(self, tier: str) -> list[str]:
        return [name for name in BINARIES[tier] if not os.access(self.binary(name), os.X_OK)]


def locate() -> Assets:
    if given := os.environ.get(GIVEN):
        return Assets(Path(given).expanduser().resolve(), given=True)
    return Assets(cache_home() / _key())


def cache_home() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "alignment-cluster"


def _key() -> str:
    digest = hashlib.sha256(FORMAT)
    for name in PINS:
        digest.update((HERE / name).read_bytes())
    return digest.hexdigest()[:12]

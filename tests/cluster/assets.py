"""Where binaries, manifests and images lie: a folder given by the user, or a cache keyed by the pinned versions."""

import hashlib
import os
from collections.abc import Iterable
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

LATER = dict.fromkeys(("jobset", "trainer-controller-manager"), ("trainer/go.mod", "trainer/go.sum"))
"""Programs with pins of their own, by which their files are called: another version builds none of the others again."""

API = (
    "etcd", "kube-apiserver", "kubectl", "kube-controller-manager", "training-operator.v1", "kueue",
    "jobset", "trainer-controller-manager",
)  # fmt: skip
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
        return self.root / "bin" / f"{name}{mark(name)}"

    def manifest(self, name: str) -> Path:
        return self.root / "manifests" / f"{name}{mark(name)}.json"

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


def mark(program: str) -> str:
    """What its files are called by beside its name; empty where the folder's name says it."""
    return f"-{_digest(LATER[program])}" if program in LATER else ""


def _key() -> str:
    return _digest(PINS)


def _digest(files: Iterable[str]) -> str:
    digest = hashlib.sha256(FORMAT)
    for name in files:
        digest.update((HERE / name).read_bytes())
    return digest.hexdigest()[:12]

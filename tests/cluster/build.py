"""Builds every server once from its Go module into the cache. Resumes after the last finished binary.

All of it takes about 2,500 CPU-seconds; a tier builds only what it runs. Several builders wait for each other.
"""

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

from cluster import manifests
from cluster.assets import BINARIES, HERE, Assets, locate, mark
from cluster.locks import exclusive

KUBERNETES = "v1.34.4"
_VERSION = "k8s.io/component-base/version"
# Without these kubectl cannot parse the server's version.
_KUBE_FLAGS = (
    f"-s -w -X {_VERSION}.gitVersion={KUBERNETES} -X {_VERSION}.gitMajor=1 -X {_VERSION}.gitMinor=34"
    f" -X {_VERSION}.gitTreeState=clean"
)
# CPU-seconds on a machine that has built nothing yet, in this order: each reuses what came before.
_COST = {
    "kube-apiserver": 450, "kubectl": 90, "etcd": 40, "training-operator.v1": 240, "kube-controller-manager": 150,
    "kueue": 490, "kube-scheduler": 40, "kwok": 240, "kubelet": 150, "kube-proxy": 30, "coredns": 300, "versitygw": 150,
    "prometheus-operator": 200, "prometheus-discovery": 10, "helm": 310, "jobset": 180, "trainer-controller-manager": 150,
}  # fmt: skip
# `go install` refuses some: they have no version list and are unknown to the checksum database, or replace modules. Those of
# one module share what they are built of.
_OWN_MODULES = {
    "kueue": ("kueue", "sigs.k8s.io/kueue/cmd/kueue"),
    "prometheus-operator": ("prometheus-operator", "github.com/prometheus-operator/prometheus-operator/cmd/operator"),
    "prometheus-discovery": ("prometheus-operator", "./discovery"),
    "jobset": ("trainer", "sigs.k8s.io/jobset"),
    "trainer-controller-manager": ("trainer", "github.com/kubeflow/trainer/v2/cmd/trainer-controller-manager"),
}

Say = Callable[[str], None]


class CannotBuild(Exception):
    """The message says what is missing."""


def announce(text: str) -> None:
    print(f"[cluster] {text}", flush=True)


def ensure(tier: str, say: Say = announce) -> Assets:
    """The assets with everything ``tier`` runs; builds what is missing. Raises CannotBuild."""
    assets = locate()
    if _complete(assets, tier):
        return assets
    if assets.given:
        raise CannotBuild(f"{assets.root} lacks {', '.join(assets.missing(tier)) or 'manifests'}")
    if not shutil.which("go"):
        raise CannotBuild("Go is not installed (https://go.dev), and ALIGNMENT_CLUSTER_ASSETS names no folder")
    with exclusive(assets.root / "lock", f"another process is building into {assets.root}; waiting for it", say):
        _build(assets, tier, say)
    return assets


def _complete(assets: Assets, tier: str) -> bool:
    return not assets.missing(tier) and all(assets.manifest(name).exists() for name in manifests.needed(tier))


def _build(assets: Assets, tier: str, say: Say) -> None:
    names = [name for name in _COST if name in assets.missing(tier)]
    if names:
        say(f"building {len(names)} programs from Go modules into {assets.root}, once: {_minutes(*names)}")
    for name in names:
        say(f"building {name}: {_minutes(name)}")
        _build_one(assets, name)
    for name in manifests.needed(tier):
        if not assets.manifest(name).exists():
            manifests.render(name, assets, _source(assets, name))


def _minutes(*names: str) -> str:
    minutes = 1 + sum(_COST[name] for name in names) // 60 // (os.cpu_count() or 1)
    return f"up to {minutes} min, less if Go has built it before"


def _build_one(assets: Assets, name: str) -> None:
    (assets.root / "bin").mkdir(parents=True, exist_ok=True)
    scratch = assets.root / "bin.part"
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir()
    _go(*_command(assets, name, scratch), GOBIN=str(scratch))
    (scratch / name).replace(assets.binary(name))
    scratch.rmdir()


def _command(assets: Assets, name: str, scratch: Path) -> list[str]:
    pins = _pins()
    if name in pins:
        return ["install", "-ldflags", "-s -w", pins[name]]
    if name in _OWN_MODULES:
        (module, package), flags = _OWN_MODULES[name], "-s -w"
    elif name == "etcd":
        module, flags, package = "kube", "-s -w", "go.etcd.io/etcd/server/v3"
    else:
        module, flags, package = "kube", _KUBE_FLAGS, f"k8s.io/kubernetes/cmd/{name}"
    at = ["-C", str(_module(assets, module, name))]
    return [*at, "build", "-mod=mod", "-ldflags", flags, "-o", str(scratch / name), package]


def _module(assets: Assets, name: str, program: str) -> Path:
    """A copy, because go may write to it and the checkout stays as it is."""
    copy = assets.root / "modules" / f"{name}{mark(program)}"
    if not copy.exists():
        shutil.copytree(HERE / name, copy)
    return copy


def _source(assets: Assets, name: str) -> Path:
    """The module's source in Go's module cache, for the manifests in it."""
    if name in _OWN_MODULES:
        module, package = _OWN_MODULES[name]
        at = ["-C", str(_module(assets, module, name))]
        output = _go(*at, "mod", "download", "-json", package.split("/cmd/")[0])
    else:
        package, version = _pins()["training-operator.v1" if name == "training-operator" else name].split("@")
        output = _go("mod", "download", "-json", f"{package.split('/cmd/')[0]}@{version}")
    return Path(json.loads(output)["Dir"])


def _go(*arguments: str, **environment: str) -> str:
    flags = {"CGO_ENABLED": "0", "GOFLAGS": "-trimpath", **environment}
    done = subprocess.run(["go", *arguments], env=os.environ | flags, capture_output=True, text=True, check=False)
    if done.returncode:
        raise CannotBuild(f"go {' '.join(arguments)} failed:\n{done.stderr[-3000:]}")
    return done.stdout


def _pins() -> dict[str, str]:
    lines = (HERE / "pins.txt").read_text().splitlines()
    return dict(line.split() for line in lines if not line.startswith("#"))


def build_all(tiers: list[str], say: Say = announce) -> None:
    for tier in tiers or list(BINARIES):
        ensure(tier, say)

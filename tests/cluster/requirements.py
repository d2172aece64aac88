"""What a tier needs of the machine, said in one line."""

import os
import shutil
import sys
from pathlib import Path
from typing import NoReturn

import pytest

from cluster.assets import Assets, locate
from cluster.images import RELEASES

_DEBIAN = {
    "openssl": "openssl", "ip": "iproute2", "nsenter": "util-linux", "unshare": "util-linux",
    "containerd": "containerd", "ctr": "containerd", "runc": "runc", "iptables": "iptables", "conntrack": "conntrack",
    "debootstrap": "debootstrap", "gcc": "gcc", "buildah": "buildah",
}  # fmt: skip
_CNI = Path("/usr/lib/cni/bridge")


def not_here(message: str) -> NoReturn:
    """Skips the test; with CI=true fails it."""
    if os.environ.get("CI") == "true":
        pytest.fail(message, pytrace=False)
    pytest.skip(message)


def missing(tier: str) -> str:
    """Empty if the tier can run here."""
    assets = locate()
    if assets.missing(tier) and (assets.given or not shutil.which("go")):
        where = f"{assets.root} lacks binaries" if assets.given else "neither Go nor ALIGNMENT_CLUSTER_ASSETS"
        return f"{where} ({', '.join(assets.missing(tier))})"
    if tier == "node":
        return _missing_for_nodes(assets)
    return _packages(["openssl"])


def _missing_for_nodes(assets: Assets) -> str:
    if os.geteuid() != 0:
        return "root is needed"
    if not assets.image("python").exists() and sys.version_info[:2] not in RELEASES:
        return f"the image needs a Debian release with this Python; there are some for {sorted(RELEASES)}"
    programs = ["openssl", "ip", "nsenter", "unshare", "containerd", "ctr", "runc", "iptables", "conntrack", "buildah"]
    if not all(assets.image(name).exists() for name in ("pause", "python")):
        programs += ["debootstrap", "gcc"]
    return _packages(programs, [] if _CNI.exists() else ["containernetworking-plugins"])


def _packages(programs: list[str], packages: list[str] | None = None) -> str:
    lacking = [program for program in programs if not shutil.which(program)]
    names = sorted({_DEBIAN[program] for program in lacking} | set(packages or []))
    return f"{', '.join(names)} missing; apt-get install {' '.join(names)}" if names else ""

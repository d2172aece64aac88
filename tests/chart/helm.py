"""Helm 4 itself, on this project's chart."""

import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import yaml
from cluster import build, requirements
from cluster.assets import locate

Object = dict[str, Any]
ROOT = Path(__file__).parents[2]
CHART = ROOT / "helm" / "alignment-operator"
NAME, NAMESPACE = "alignment-operator", "alignment-system"


class Loader(yaml.CSafeLoader):
    """Numbers as Helm writes and Kubernetes reads them: 2e-05 is a text for PyYAML."""


Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"-?[0-9]+(\.[0-9]+)?[eE][-+]?[0-9]+$"), list("-0123456789")
)


class HelmError(Exception):
    """The message is what Helm wrote to stderr."""


def helm(*arguments: str, kubeconfig: Path | None = None, text: str | None = None, timeout: float = 120) -> str:
    """Its output. Raises HelmError."""
    # Nobody's cluster, unless one is named.
    environment = {**os.environ, "KUBECONFIG": str(kubeconfig or os.devnull)}
    done = subprocess.run(
        [str(binary()), *arguments], input=text, env=environment, capture_output=True, text=True, timeout=timeout, check=False
    )  # fmt: skip
    if done.returncode:
        raise HelmError(done.stderr + done.stdout)
    return done.stdout


def binary() -> Path:
    """Built once. Where it cannot be, the test is skipped; with CI=true it fails."""
    assets = locate()
    if assets.missing("chart") and (assets.given or not shutil.which("go")):
        requirements.not_here("helm: neither Go to build it nor ALIGNMENT_CLUSTER_ASSETS with it")
    return build.ensure("chart").binary("helm")


def template(
    values: Object | None = None, *arguments: str, name: str = NAME, namespace: str = NAMESPACE
) -> list[Object]:
    """The objects that the chart makes of ``values``."""
    flags = [name, str(CHART), "--namespace", namespace, "--values", "-", *arguments]
    text = helm("template", *flags, text=yaml.safe_dump(values or {}))
    return [document for document in yaml.load_all(text, Loader) if document]


def one(objects: list[Object], kind: str, name: str | None = None) -> Object:
    found = [o for o in objects if o["kind"] == kind and name in (None, o["metadata"]["name"])]
    assert len(found) == 1, f"{len(found)} of {kind} {name or ''}"
    return found[0]

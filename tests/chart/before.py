"""An older version of this project as it was: its code, its chart and its images, out of the repository's history."""

import os
import subprocess
import tarfile
from dataclasses import dataclass
from pathlib import Path

import yaml
from cluster import product
from cluster.assets import Assets
from cluster.client import Cluster
from cluster.requirements import not_here

from chart.helm import ROOT

REVISION = os.environ.get("FROM", "f35bd74")
"""Whose runs an upgrade has to leave alone; FROM=REVISION tries another. None has been released yet."""
NUMBER = "0.0.9"
"""What it calls itself, so that versions differ as those of releases do."""


@dataclass(frozen=True)
class Before:
    tree: Path

    @property
    def chart(self) -> Path:
        return self.tree / "helm/alignment-operator"

    def load(self, cluster: Cluster, assets: Assets) -> None:
        """Both images, with the tag `before`."""
        folder = cluster.state / "images"
        operator = product.operator_image_of(
            self.tree, "alignment-operator:before", assets, folder / "operator-before.tar"
        )
        cluster.load_image(operator)
        cluster.load_image(
            product.trainer_image(assets, folder / "trainer-before.tar", self.tree, "alignment-trainer:before")
        )


def checked_out(folder: Path) -> Before:
    """Into an empty folder. Where the history is not there, as in a shallow clone, the test cannot be."""
    archive = folder / "before.tar"
    command = ["git", "-C", str(ROOT), "archive", f"--output={archive}", REVISION]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        not_here(f"the history of this repository, with {REVISION} in it: git fetch --unshallow")
    tree = folder / "tree"
    with tarfile.open(archive) as tar:
        tar.extractall(tree, filter="data")
    _number(tree)
    return Before(tree)


def _number(tree: Path) -> None:
    chart, version = tree / "helm/alignment-operator/Chart.yaml", tree / "trainers/__init__.py"
    told = yaml.safe_load(chart.read_text())
    version.write_text(version.read_text().replace(f'"{told["appVersion"]}"', f'"{NUMBER}"'))
    chart.write_text(yaml.safe_dump(told | {"version": NUMBER, "appVersion": NUMBER}))

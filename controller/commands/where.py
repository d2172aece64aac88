"""Where a command looks: into a workspace on this machine, or into a cluster as kubectl's options name it."""

import shlex
import sys
from dataclasses import dataclass
from pathlib import Path, PurePath

from controller import runs_folder
from controller.api.problems import InvalidRun, Problem

ALIGNCTL = "alignctl"
PLUGIN = "kubectl align"


def program() -> str:
    """What people typed: kubectl starts its plugin `align` as `kubectl-align`."""
    return PLUGIN if PurePath(sys.argv[0]).stem == "kubectl-align" else ALIGNCTL


def panel() -> str:
    """Title of the options that are about clusters, which says when a command looks there."""
    return "In a cluster" if program() == PLUGIN else "In a cluster (with --context, -n or --kubeconfig)"


@dataclass(frozen=True)
class Place:
    """A namespace of a cluster; what is not set is the kubeconfig's."""

    context: str | None = None
    namespace: str | None = None
    kubeconfig: Path | None = None

    def command(self, verb: str, run: str) -> str:
        """A command to type, for the same place."""
        options = {"--kubeconfig": self.kubeconfig, "--context": self.context, "-n": self.namespace}
        named = [word for flag, value in options.items() if value is not None for word in (flag, str(value))]
        return f"{program()} {verb} " + shlex.join([*named, "--run", run])


def choose(root: Path | None, context: str | None, namespace: str | None, kubeconfig: Path | None) -> Path | Place:
    """The workspace or the cluster that the options mean."""
    named = {"--context": context, "--namespace": namespace, "--kubeconfig": kubeconfig}
    flags = [flag for flag, value in named.items() if value is not None]
    if root is not None and flags:
        text = f"is a folder on this machine and {flags[0]} means a cluster: use one of them"
        raise InvalidRun([Problem("--workspace", text)])
    if flags or (root is None and program() == PLUGIN):
        return Place(context, namespace, kubeconfig)
    return root or runs_folder.DEFAULT


def only_in_a_cluster(option: str, value: object) -> None:
    if value:
        raise InvalidRun([Problem(option, "is for runs in a cluster (--context, -n)")])

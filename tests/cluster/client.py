"""What tests hold of a cluster: kubectl, namespaces, identities, nodes."""

import json
import secrets
import subprocess
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import pytest

from cluster import keeper, launch, pki
from cluster.processes import wait_for

T = TypeVar("T")
Manifest = str | Path | dict[str, Any] | list[dict[str, Any]]


class KubectlError(Exception):
    """The message is what kubectl wrote to stderr."""


class NotThere(KubectlError):
    """Of what was asked for there is none."""


@dataclass
class Cluster:
    """One running cluster. ``state`` has ``logs/``; all of it goes away with the cluster."""

    tier: str
    kubeconfig: Path
    kubectl_binary: Path
    state: Path
    audit_log: Path | None = None
    nodes: list[str] = field(default_factory=list)
    created: list[str] = field(default_factory=list)

    def kubectl(
        self,
        *arguments: str,
        input: str | None = None,  # noqa: A002 (as in subprocess.run)
        check: bool = True,
        timeout: float = 60,
    ) -> str:
        """stdout; with ``check=False`` stdout and stderr, whatever the exit code. Raises KubectlError, TimeoutExpired."""
        command = [str(self.kubectl_binary), f"--kubeconfig={self.kubeconfig}", *arguments]
        done = subprocess.run(command, input=input, capture_output=True, text=True, timeout=timeout, check=False)
        if check and done.returncode:
            raise KubectlError(f"kubectl {' '.join(arguments)}: {done.stderr.strip()}")
        return done.stdout if check else done.stdout + done.stderr

    def get(self, *arguments: str) -> dict[str, Any]:
        """``get("pod", "x", "-n", "y")`` as `kubectl get -o json` has it; NotThere when there is none.

        Tests ask again and again until something is so: a kubectl each time would take a core while they wait.
        """
        from cluster import kube_http

        path = kube_http.path_of(*arguments)
        if path is None:
            return json.loads(self.kubectl("get", *arguments, "-o", "json"))
        found = kube_http.Server(self).get(path)
        if found is None:
            raise NotThere(f"kubectl get {' '.join(arguments)}: NotFound")
        for item in found.get("items", [found]):
            item |= {"apiVersion": found["apiVersion"], "kind": found["kind"].removesuffix("List")}
            item["metadata"].pop("managedFields", None)
        return found

    def items(self, *arguments: str) -> list[dict[str, Any]]:
        return self.get(*arguments)["items"]

    def apply(self, manifest: Manifest, namespace: str = "") -> str:
        """Text, a file, one document or several. Server-side apply; conflicts are errors."""
        return self.kubectl("apply", "--server-side", *_in(namespace), "-f", "-", input=_text(manifest))

    def create(self, manifest: Manifest, namespace: str = "") -> str:
        return self.kubectl("create", *_in(namespace), "-f", "-", input=_text(manifest))

    def define(self, kinds: Manifest) -> None:
        """Apply CustomResourceDefinitions, and wait until all of the cluster are served.

        kubectl's own wait fails on one that has no status yet.
        """
        self.apply(kinds)
        self.wait(lambda: all(_holds(kind, "Established") for kind in self.items("crd")), 60, "the kinds are served")

    def patch_status(self, kind: str, name: str, namespace: str, status: dict[str, Any]) -> str:
        """What a kubelet or controller would write: ends pods by hand where no node runs them."""
        patch = json.dumps({"status": status})
        return self.kubectl("patch", kind, name, "-n", namespace, "--subresource=status", "--type=merge", "-p", patch)

    def namespace(self, prefix: str = "test", restricted: bool = True) -> str:
        """A fresh namespace whose default ServiceAccount exists, by default with restricted Pod Security."""
        name = f"{prefix}-{secrets.token_hex(3)}"
        labels = {"pod-security.kubernetes.io/enforce": "restricted"} if restricted else {}
        self.create({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name, "labels": labels}})
        self.created.append(name)
        self.wait(lambda: self.items("serviceaccounts", "-n", name), 30, f"the ServiceAccount of {name}")
        return name

    def delete_namespace(self, name: str, wait: bool = False) -> None:
        self.kubectl("delete", "namespace", name, "--ignore-not-found", f"--wait={str(wait).lower()}", timeout=180)

    def service_account_kubeconfig(self, namespace: str, name: str) -> Path:
        """To run a program outside pods with a ServiceAccount's own rights; the token holds for a day."""
        token = self.kubectl("create", "token", name, "-n", namespace, "--duration=24h").strip()
        cluster = json.loads(self.kubectl("config", "view", "--raw", "--minify", "--flatten", "-o", "json"))[
            "clusters"
        ][0]["cluster"]
        out = self.state / f"{namespace}-{name}.kubeconfig"
        return pki.write_kubeconfig(
            out, cluster["server"], cluster["certificate-authority-data"], {"token": token}, namespace
        )

    def wait(self, predicate: Callable[[], T], timeout: float = 60, what: str = "it holds", every: float = 0.2) -> T:
        """The first true value of ``predicate``; what it looks at need not be there yet. Raises TimeoutError."""

        def once_there() -> T | None:
            try:
                return predicate()
            except NotThere:
                return None

        return wait_for(once_there, timeout, what, every)

    def condition(self, kind: str, name: str, namespace: str, type_: str) -> bool:
        return _holds(self.get(kind, name, "-n", namespace), type_)

    def audited(self, user: str = "", verbs: Iterable[str] = ()) -> list[dict[str, Any]]:
        """Audit events in order, of a user whose name contains ``user`` and with one of ``verbs``."""
        assert self.audit_log, "this cluster has no audit log"
        # Of a hundred thousand lines most are of others.
        events = (json.loads(line) for line in self.audit_log.read_text().splitlines() if user in line)
        wanted = set(verbs)
        return [e for e in events if user in e["user"].get("username", "") and (not wanted or e["verb"] in wanted)]

    def kill_node(self, name: str) -> None:
        """Like a loss of power; NotReady after 20 s."""
        self._ask("kill", name)

    def start_node(self, name: str) -> None:
        """Its disk is as it was."""
        self._ask("start", name)

    def load_image(self, archive: Path) -> None:
        """Into every node, and into those started later. Pods need a tag other than latest."""
        self._ask("load", str(archive))

    def restart_server(self, name: str) -> None:
        """kill -9 of `etcd`, `kube-apiserver`, `training-operator`, `kueue`, `kwok` …, which then begins again."""
        self._ask("restart", name)

    def save(self, label: str) -> None:
        """A backup of the whole cluster's state."""
        self._ask("save", label)

    def restore(self, label: str) -> None:
        """It is again what it was at that backup, whatever has happened since."""
        self._ask("restore", label)

    def _ask(self, action: str, argument: str) -> None:
        if not (self.state / keeper.CONTROL).exists():
            pytest.skip(f"{action} needs a cluster of the tests' own")
        launch.ask(self.state, action, argument)

    def release(self) -> None:
        """Deletes the namespaces made here: for clusters that stay."""
        for name in self.created:
            self.delete_namespace(name)


def _holds(item: dict[str, Any], type_: str) -> bool:
    conditions = item.get("status", {}).get("conditions") or []
    return any(one["type"] == type_ and one["status"] == "True" for one in conditions)


def _in(namespace: str) -> list[str]:
    return ["-n", namespace] if namespace else []


def _text(manifest: Manifest) -> str:
    if isinstance(manifest, Path):
        return manifest.read_text()
    if isinstance(manifest, list):
        return json.dumps({"apiVersion": "v1", "kind": "List", "items": manifest})
    return manifest if isinstance(manifest, str) else json.dumps(manifest)

"""etcd, API server, controller manager and scheduler as processes, on loopback or in a network namespace."""

import http.client
import json
import shutil
import ssl
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster import pki
from cluster.assets import Assets
from cluster.processes import Children

SERVICES = "10.96.0.0/16"
FIRST_SERVICE = "10.96.0.1"

# Every request with its user and verb, once it is answered; no bodies.
_AUDIT_POLICY = {
    "apiVersion": "audit.k8s.io/v1", "kind": "Policy",
    "omitStages": ["RequestReceived"], "rules": [{"level": "Metadata"}],
}  # fmt: skip


@dataclass(frozen=True)
class Place:
    """Where the control plane runs: its address, ports there, its folder, and what precedes each command."""

    state: Path
    address: str
    api_port: int
    etcd_ports: tuple[int, int]
    enter: Sequence[str | Path] = ()

    @property
    def url(self) -> str:
        return f"https://{self.address}:{self.api_port}"

    @property
    def keys(self) -> Path:
        return self.state / "pki"

    @property
    def kubeconfig(self) -> Path:
        return self.state / "admin.kubeconfig"

    @property
    def audit_log(self) -> Path:
        return self.state / "logs" / "audit.log"

    def component_kubeconfig(self, name: str) -> Path:
        return self.state / f"{name}.kubeconfig"


def make_keys(place: Place) -> pki.Authority:
    """Certificates and kubeconfigs of everything but the nodes."""
    authority = pki.Authority(place.keys)
    names = [
        "localhost",
        "kubernetes",
        "kubernetes.default",
        "kubernetes.default.svc",
        "kubernetes.default.svc.cluster.local",
    ]
    addresses = {"127.0.0.1", FIRST_SERVICE, place.address}
    authority.sign("apiserver", "/CN=kube-apiserver", *(f"DNS:{n}" for n in names), *(f"IP:{a}" for a in addresses))
    authority.sign("apiserver-kubelet-client", "/O=system:masters/CN=kube-apiserver-kubelet-client")
    authority.sign("front-proxy", "/CN=front-proxy")
    for name, subject in (
        ("admin", "/O=system:masters/CN=admin"),
        ("controller-manager", "/CN=system:kube-controller-manager"),
        ("scheduler", "/CN=system:kube-scheduler"),
        ("proxy", "/CN=system:kube-proxy"),
    ):
        authority.sign(name, subject)
        authority.kubeconfig(name, place.url, place.component_kubeconfig(name))
    pki.service_account_keys(place.keys)
    return authority


def kubectl(place: Place, assets: Assets, *arguments: str, text: str = "") -> str:
    """As the administrator. Raises RuntimeError with what kubectl wrote."""
    command = [str(assets.binary("kubectl")), f"--kubeconfig={place.kubeconfig}", *arguments]
    done = subprocess.run(command, input=text, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"kubectl {' '.join(arguments)}: {done.stderr.strip()}")
    return done.stdout


def apply(place: Place, assets: Assets, documents: list[dict[str, Any]]) -> None:
    listed = {"apiVersion": "v1", "kind": "List", "items": documents}
    kubectl(place, assets, "apply", "--server-side", "-f", "-", text=json.dumps(listed))


def start(place: Place, assets: Assets, children: Children, scheduler: bool) -> None:
    """Returns when the API server is ready; the others follow by themselves."""
    children.start("etcd", [*place.enter, assets.binary("etcd"), *_etcd(place)])
    children.start("kube-apiserver", [*place.enter, assets.binary("kube-apiserver"), *_apiserver(place)])
    children.wait_for(lambda: is_ready(place), 120, "the API server answers /readyz")
    children.start(
        "kube-controller-manager", [*place.enter, assets.binary("kube-controller-manager"), *_manager(place)]
    )
    if scheduler:
        children.start("kube-scheduler", [*place.enter, assets.binary("kube-scheduler"), *_scheduler(place)])


def save(place: Place, children: Children, label: str) -> None:
    """A backup of etcd, as its disk is now; nobody loses a connection."""
    with children.stopped("etcd"):
        shutil.copytree(place.state / "etcd", place.state / f"etcd-{label}")


def restore(place: Place, children: Children, label: str) -> None:
    """Etcd is again what it was at a backup; whoever else talks to it is the caller's to end before, and to start again.

    The harsher kind: revisions are counted from the backup's on, so that there are two different states of one revision.
    """
    children.kill("etcd")
    shutil.rmtree(place.state / "etcd")
    shutil.copytree(place.state / f"etcd-{label}", place.state / "etcd")
    children.again("etcd")
    children.again("kube-apiserver")
    children.wait_for(lambda: is_ready(place), 120, "the API server answers /readyz")


def _etcd(place: Place) -> list[str]:
    client, peer = (f"http://127.0.0.1:{port}" for port in place.etcd_ports)
    return [
        f"--data-dir={place.state / 'etcd'}", "--unsafe-no-fsync", "--log-level=warn",
        f"--listen-client-urls={client}", f"--advertise-client-urls={client}",
        f"--listen-peer-urls={peer}", f"--initial-advertise-peer-urls={peer}", f"--initial-cluster=default={peer}",
    ]  # fmt: skip


def _apiserver(place: Place) -> list[str]:
    keys = place.keys
    policy = place.state / "audit-policy.json"
    policy.write_text(json.dumps(_AUDIT_POLICY))
    # The Service "kubernetes" cannot lead to a loopback address; without pods nobody uses it.
    endpoints = ["--endpoint-reconciler-type=none"] if place.address.startswith("127.") else []
    return [
        f"--etcd-servers=http://127.0.0.1:{place.etcd_ports[0]}", *endpoints,
        f"--bind-address={place.address}", f"--secure-port={place.api_port}", f"--advertise-address={place.address}",
        f"--service-cluster-ip-range={SERVICES}",
        "--service-account-issuer=https://kubernetes.default.svc",
        f"--service-account-signing-key-file={keys}/sa.key", f"--service-account-key-file={keys}/sa.pub",
        f"--client-ca-file={keys}/ca.crt",
        f"--tls-cert-file={keys}/apiserver.crt", f"--tls-private-key-file={keys}/apiserver.key",
        f"--kubelet-client-certificate={keys}/apiserver-kubelet-client.crt",
        f"--kubelet-client-key={keys}/apiserver-kubelet-client.key",
        f"--kubelet-certificate-authority={keys}/ca.crt", "--kubelet-preferred-address-types=InternalIP",
        f"--requestheader-client-ca-file={keys}/ca.crt", "--requestheader-allowed-names=front-proxy",
        "--requestheader-username-headers=X-Remote-User", "--requestheader-group-headers=X-Remote-Group",
        "--requestheader-extra-headers-prefix=X-Remote-Extra-",
        f"--proxy-client-cert-file={keys}/front-proxy.crt", f"--proxy-client-key-file={keys}/front-proxy.key",
        "--allow-privileged=true", "--authorization-mode=Node,RBAC", "--enable-admission-plugins=NodeRestriction",
        # Webhooks in pods are called at their pod's address: the control plane has no kube-proxy.
        "--enable-aggregator-routing=true",
        "--profiling=false", f"--audit-policy-file={policy}", f"--audit-log-path={place.audit_log}",
    ]  # fmt: skip


def _manager(place: Place) -> list[str]:
    keys = place.keys
    return [
        f"--kubeconfig={place.component_kubeconfig('controller-manager')}", "--secure-port=0", "--leader-elect=false",
        "--use-service-account-credentials=true", f"--service-account-private-key-file={keys}/sa.key",
        f"--root-ca-file={keys}/ca.crt",
        f"--cluster-signing-cert-file={keys}/ca.crt", f"--cluster-signing-key-file={keys}/ca.key",
        # A dead node is noticed after 20 s, not 50.
        "--node-monitor-grace-period=20s", "--node-monitor-period=2s",
    ]  # fmt: skip


def _scheduler(place: Place) -> list[str]:
    return [f"--kubeconfig={place.component_kubeconfig('scheduler')}", "--secure-port=0", "--leader-elect=false"]


def is_ready(place: Place) -> bool:
    context = ssl.create_default_context(cafile=place.keys / "ca.crt")
    context.load_cert_chain(place.keys / "admin.crt", place.keys / "admin.key")
    connection = http.client.HTTPSConnection(place.address, place.api_port, context=context, timeout=5)
    try:
        connection.request("GET", "/readyz")
        return connection.getresponse().status == 200
    except OSError:
        return False
    finally:
        connection.close()

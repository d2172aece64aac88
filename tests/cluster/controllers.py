"""The jobs' controllers as processes beside the API server, with their real webhooks: Training Operator, Trainer, JobSet, Kueue.

All bring a certificate rotator. It leaves alone a Secret that already holds a valid authority and certificate, so all
get one made here that is good for 127.0.0.1 as well, and the API server calls the webhooks there by URL.
"""

import functools
import json
import os
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster import manifests, pki
from cluster.assets import Assets
from cluster.controlplane import Place, apply
from cluster.processes import Children, free_ports

FRAMEWORKS = "ALIGNMENT_TEST_KUEUE_FRAMEWORKS"
"""Kueue's integrations, comma-separated: for a test of one that is switched off."""
MANAGES_ALL = "ALIGNMENT_TEST_KUEUE_MANAGES_ALL"
"""Set: Kueue holds jobs without a queue too (`manageJobsWithoutQueueName`)."""
_FRAMEWORKS = "kubeflow.org/pytorchjob,trainer.kubeflow.org/trainjob"
_SERVICES = {
    "training-operator": "training-operator.kubeflow.svc",
    "jobset": "jobset-webhook-service.jobset-system.svc",
    "trainer-controller-manager": "kubeflow-trainer-controller-manager.kubeflow-system.svc",
    "kueue": "kueue-webhook-service.kueue-system.svc",
}
"""By manifest, in the order of their starts: each wants the kinds of those before it."""
# The rotators accept an authority only under their own name for it.
_AUTHORITIES = ["training-operator-ca", "jobset-ca", "kubeflow-trainer-ca", "kueue-ca"]
# Some rotators wait for this file, wherever the certificates really are.
_MARKER = Path("/tmp/k8s-webhook-server/serving-certs/tls.crt")


@dataclass(frozen=True)
class Ports:
    webhook: int
    health: int


def start(place: Place, assets: Assets, children: Children, fast: bool) -> dict[str, Callable[[], bool]]:
    """Returns what tells of each that it is ready.

    ``fast`` lifts the limits of those that make pods (the Training Operator has 20 requests a second as shipped).
    """
    certificates = _make_certificates(place)
    free = iter(free_ports(2 * len(_SERVICES)))
    ports = {name: Ports(next(free), next(free)) for name in _SERVICES}
    apply(
        place, assets,
        [document for name, port in ports.items() for document in
         manifests.for_process(assets.manifest(name), f"https://127.0.0.1:{port.webhook}", certificates)],
    )  # fmt: skip
    _start_operator(place, assets, children, ports["training-operator"], fast)
    _start_jobset(place, assets, children, ports["jobset"])
    _start_trainer(place, assets, children, ports["trainer-controller-manager"], fast)
    _start_kueue(place, assets, children, ports["kueue"])
    ready = {name: functools.partial(_marked_ready, place, port.health) for name, port in ports.items()}
    for name, is_ready in ready.items():
        children.wait_for(is_ready, 120, f"{name} is ready")
    unmark()
    return ready


def _make_certificates(place: Place) -> dict[str, str]:
    folder = place.state / "webhooks"
    authority = pki.Authority(folder, rsa_for=_AUTHORITIES)
    names = list(_SERVICES.values())
    authority.sign("tls", f"/CN={names[0]}", *(f"DNS:{name}" for name in names), "IP:127.0.0.1")
    # controller-runtime looks for its certificates under TMPDIR.
    served = folder / "k8s-webhook-server" / "serving-certs"
    served.mkdir(parents=True)
    for name in ("tls.crt", "tls.key"):
        (served / name).write_bytes((folder / name).read_bytes())
    return {name: pki.encoded(folder / name) for name in ("ca.crt", "ca.key", "tls.crt", "tls.key")}


def _start_operator(place: Place, assets: Assets, children: Children, ports: Ports, fast: bool) -> None:
    limits = ["--kube-api-qps=200", "--kube-api-burst=300", "--controller-threads=4"] if fast else []
    command = [
        *place.enter, assets.binary("training-operator.v1"), f"--kubeconfig={place.kubeconfig}",
        "--enable-scheme=pytorchjob", f"--webhook-server-port={ports.webhook}", "--metrics-bind-address=0",
        f"--health-probe-bind-address={place.address}:{ports.health}", *limits,
    ]  # fmt: skip
    children.start("training-operator", command, {"TMPDIR": str(place.state / "webhooks")})


def _start_jobset(place: Place, assets: Assets, children: Children, ports: Ports) -> None:
    settings = _settings(place, ports, "config.jobset.x-k8s.io/v1alpha1") | {
        "internalCertManagement": {
            "enable": True,
            "webhookServiceName": "jobset-webhook-service", "webhookSecretName": "jobset-webhook-server-cert",
        },
    }  # fmt: skip
    _start(place, assets, children, "jobset", settings)


def _start_trainer(place: Place, assets: Assets, children: Children, ports: Ports, fast: bool) -> None:
    settings = _settings(place, ports, "config.trainer.kubeflow.org/v1alpha1") | {
        "certManagement": {
            "enable": True,
            "webhookServiceName": "kubeflow-trainer-controller-manager",
            "webhookSecretName": "kubeflow-trainer-webhook-cert",
        },
        **({"clientConnection": {"qps": 200, "burst": 300}} if fast else {}),
    }  # fmt: skip
    _start(place, assets, children, "trainer-controller-manager", settings)


def _start_kueue(place: Place, assets: Assets, children: Children, ports: Ports) -> None:
    settings = _settings(place, ports, "config.kueue.x-k8s.io/v1beta2") | {
        "namespace": "kueue-system",
        "clientConnection": {"qps": 300, "burst": 500},
        "internalCertManagement": {
            "enable": True,
            "webhookServiceName": "kueue-webhook-service", "webhookSecretName": "kueue-webhook-server-cert",
        },
        "webhook": {
            "host": "127.0.0.1", "port": ports.webhook,
            "certDir": str(place.state / "webhooks" / "k8s-webhook-server" / "serving-certs"),
        },
        "integrations": {"frameworks": os.environ.get(FRAMEWORKS, _FRAMEWORKS).split(",")},
        "manageJobsWithoutQueueName": MANAGES_ALL in os.environ,
    }  # fmt: skip
    _start(place, assets, children, "kueue", settings, "--feature-gates=VisibilityOnDemand=false")


def _settings(place: Place, ports: Ports, version: str) -> dict[str, Any]:
    return {
        "apiVersion": version, "kind": "Configuration",
        "health": {"healthProbeBindAddress": f"{place.address}:{ports.health}"},
        "metrics": {"bindAddress": "0"},
        "webhook": {"host": "127.0.0.1", "port": ports.webhook},
        "leaderElection": {"leaderElect": False},
    }  # fmt: skip


def _start(
    place: Place, assets: Assets, children: Children, name: str, settings: dict[str, Any], *flags: str
) -> None:  # fmt: skip
    path = place.state / f"{name}.json"
    path.write_text(json.dumps(settings))
    environment = {"KUBECONFIG": str(place.kubeconfig), "TMPDIR": str(place.state / "webhooks")}
    children.start(name, [*place.enter, assets.binary(name), f"--config={path}", *flags], environment)


def _marked_ready(place: Place, port: int) -> bool:
    """Another cluster that starts at the same time may take the marker away, so it is put there again each time."""
    _MARKER.parent.mkdir(parents=True, exist_ok=True)
    _MARKER.touch()
    return _is_ready(place, port)


def unmark() -> None:
    _MARKER.unlink(missing_ok=True)
    for folder in (_MARKER.parent, _MARKER.parent.parent):
        try:
            folder.rmdir()
        except OSError:
            return


def _is_ready(place: Place, port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://{place.address}:{port}/readyz", timeout=5) as answer:
            return answer.status == 200
    except OSError:
        return False

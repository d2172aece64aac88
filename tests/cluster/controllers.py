"""Training Operator and Kueue as processes beside the API server, with their real webhooks.

Both bring a certificate rotator. It leaves alone a Secret that already holds a valid authority and certificate, so both
get one made here that is good for 127.0.0.1 as well, and the API server calls the webhooks there by URL.
"""

import json
import os
import urllib.request
from collections.abc import Callable
from pathlib import Path

from cluster import manifests, pki
from cluster.assets import Assets
from cluster.controlplane import Place, apply
from cluster.processes import Children, free_ports

FRAMEWORKS = "ALIGNMENT_TEST_KUEUE_FRAMEWORKS"
"""Kueue's integrations, comma-separated: for a test of one that is switched off."""
# The rotators accept an authority only under their own name for it.
_AUTHORITIES = ["training-operator-ca", "kueue-ca"]
_SERVICES = ["training-operator.kubeflow.svc", "kueue-webhook-service.kueue-system.svc"]
# The rotator of the Training Operator waits for this file, wherever the certificates really are.
_MARKER = Path("/tmp/k8s-webhook-server/serving-certs/tls.crt")


def start(place: Place, assets: Assets, children: Children, fast: bool) -> dict[str, Callable[[], bool]]:
    """Returns what tells of each that it is ready. ``fast`` lifts the Training Operator's limit of 20 requests a second."""
    certificates = _make_certificates(place)
    operator_port, operator_health, kueue_port, kueue_health = free_ports(4)
    documents = [
        *manifests.for_process(
            assets.manifest("training-operator"), f"https://127.0.0.1:{operator_port}", certificates
        ),
        *manifests.for_process(assets.manifest("kueue"), f"https://127.0.0.1:{kueue_port}", certificates),
    ]
    apply(place, assets, documents)
    _start_operator(place, assets, children, operator_port, operator_health, fast)
    _start_kueue(place, assets, children, kueue_port, kueue_health)
    ready = {
        "training-operator": lambda: _marked_ready(place, operator_health),
        "kueue": lambda: _is_ready(place, kueue_health),
    }
    for name, is_ready in ready.items():
        children.wait_for(is_ready, 120, f"{name} is ready")
    unmark()
    return ready


def _make_certificates(place: Place) -> dict[str, str]:
    folder = place.state / "webhooks"
    authority = pki.Authority(folder, rsa_for=_AUTHORITIES)
    authority.sign("tls", f"/CN={_SERVICES[0]}", *(f"DNS:{name}" for name in _SERVICES), "IP:127.0.0.1")
    # controller-runtime looks for its certificates under TMPDIR.
    served = folder / "k8s-webhook-server" / "serving-certs"
    served.mkdir(parents=True)
    for name in ("tls.crt", "tls.key"):
        (served / name).write_bytes((folder / name).read_bytes())
    return {name: pki.encoded(folder / name) for name in ("ca.crt", "ca.key", "tls.crt", "tls.key")}


def _start_operator(place: Place, assets: Assets, children: Children, port: int, health: int, fast: bool) -> None:
    limits = ["--kube-api-qps=200", "--kube-api-burst=300", "--controller-threads=4"] if fast else []
    command = [
        *place.enter, assets.binary("training-operator.v1"), f"--kubeconfig={place.kubeconfig}",
        "--enable-scheme=pytorchjob", f"--webhook-server-port={port}", "--metrics-bind-address=0",
        f"--health-probe-bind-address={place.address}:{health}", *limits,
    ]  # fmt: skip
    children.start("training-operator", command, {"TMPDIR": str(place.state / "webhooks")})


def _start_kueue(place: Place, assets: Assets, children: Children, port: int, health: int) -> None:
    config = {
        "apiVersion": "config.kueue.x-k8s.io/v1beta2", "kind": "Configuration", "namespace": "kueue-system",
        "health": {"healthProbeBindAddress": f"{place.address}:{health}"},
        "metrics": {"bindAddress": "0"},
        "webhook": {
            "host": "127.0.0.1", "port": port,
            "certDir": str(place.state / "webhooks" / "k8s-webhook-server" / "serving-certs"),
        },
        "leaderElection": {"leaderElect": False},
        "clientConnection": {"qps": 300, "burst": 500},
        "internalCertManagement": {
            "enable": True,
            "webhookServiceName": "kueue-webhook-service", "webhookSecretName": "kueue-webhook-server-cert",
        },
        "integrations": {"frameworks": os.environ.get(FRAMEWORKS, "kubeflow.org/pytorchjob").split(",")},
    }  # fmt: skip
    path = place.state / "kueue.json"
    path.write_text(json.dumps(config))
    command = [*place.enter, assets.binary("kueue"), f"--config={path}", "--feature-gates=VisibilityOnDemand=false"]
    children.start("kueue", command, {"KUBECONFIG": str(place.kubeconfig)})


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

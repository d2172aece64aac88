"""An admission webhook that refuses jobs, as a cluster's own policies may: a server with a certificate, and its registration."""

import base64
import json
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from cluster import pki
from cluster.client import Cluster

NAME = "jobs.refused.example"
WORDS = "jobs need a cost centre"


class _Refuses(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["request"]
        answer = {"uid": request["uid"], "allowed": False, "status": {"code": 403, "message": WORDS}}
        body = json.dumps({"apiVersion": "admission.k8s.io/v1", "kind": "AdmissionReview", "response": answer}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        """Nobody reads it."""


@contextmanager
def refused_jobs(cluster: Cluster, namespace: str, folder: Path, answers: bool) -> Iterator[None]:
    """Jobs in this namespace are refused, or, where the webhook does not answer, cannot be asked about."""
    authority = pki.Authority(folder)
    authority.sign("webhook", f"/CN={NAME}", "IP:127.0.0.1")
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Refuses)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "webhook.crt", folder / "webhook.key")
    server.socket = context.wrap_socket(server.socket, server_side=True)
    if answers:
        threading.Thread(target=server.serve_forever, daemon=True).start()
    else:
        server.server_close()
    cluster.apply(_registration(server.server_address[1], namespace, (folder / "ca.crt").read_bytes()))
    try:
        yield
    finally:
        cluster.kubectl("delete", "validatingwebhookconfiguration", NAME)
        if answers:
            server.shutdown()
            server.server_close()


def _registration(port: int, namespace: str, authority: bytes) -> dict[str, Any]:
    return {
        "apiVersion": "admissionregistration.k8s.io/v1",
        "kind": "ValidatingWebhookConfiguration",
        "metadata": {"name": NAME},
        "webhooks": [
            {
                "name": NAME,
                "clientConfig": {
                    "url": f"https://127.0.0.1:{port}/",
                    "caBundle": base64.b64encode(authority).decode(),
                },
                "rules": [
                    {
                        "apiGroups": ["kubeflow.org"],
                        "apiVersions": ["v1"],
                        "operations": ["CREATE"],
                        "resources": ["pytorchjobs"],
                    }
                ],
                "namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": namespace}},
                "failurePolicy": "Fail",
                "sideEffects": "None",
                "admissionReviewVersions": ["v1"],
                "timeoutSeconds": 2,
            }
        ],
    }

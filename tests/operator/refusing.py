"""What refuses jobs in a cluster: an admission webhook (a server with a certificate, and its registration), and a policy."""

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
SAID = "jobs need \x1b[2Ja cost \u202ecentre"
"""With what a terminal would obey."""
CODES = (400, 403, 404, 409, 422, 429, 500)
"""A webhook may choose any. A job called `refused422-…` meets that one, others 403."""
POLICY = "policied"
"""Jobs of that name are the policy's."""


class _Refuses(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["request"]
        code = next((code for code in CODES if request["name"].startswith(f"refused{code}-")), 403)
        answer = {"uid": request["uid"], "allowed": False, "status": {"code": code, "message": SAID}}
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


@contextmanager
def policy(cluster: Cluster, namespace: str) -> Iterator[None]:
    """One that names no reason: it says 422, as for an object that is invalid."""
    rule = {"apiGroups": ["kubeflow.org"], "apiVersions": ["*"], "operations": ["CREATE"], "resources": ["pytorchjobs"]}
    expression = f"!object.metadata.name.startsWith('{POLICY}')"
    spec = {
        "matchConstraints": {"resourceRules": [rule]},
        "validations": [{"expression": expression, "message": WORDS}],
    }
    binding = {
        "policyName": NAME,
        "validationActions": ["Deny"],
        "matchResources": {"namespaceSelector": _only(namespace)},
    }
    for kind, part in (("ValidatingAdmissionPolicy", spec), ("ValidatingAdmissionPolicyBinding", binding)):
        api = "admissionregistration.k8s.io/v1"
        cluster.apply({"apiVersion": api, "kind": kind, "metadata": {"name": NAME}, "spec": part})
    try:
        yield
    finally:
        cluster.kubectl("delete", "validatingadmissionpolicybinding,validatingadmissionpolicy", NAME)


def _only(namespace: str) -> dict[str, Any]:
    return {"matchLabels": {"kubernetes.io/metadata.name": namespace}}


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
                "namespaceSelector": _only(namespace),
                # The rest is for the policy to refuse, which is asked at the same time.
                "matchConditions": [{"name": "others", "expression": f"!object.metadata.name.startsWith('{POLICY}')"}],
                "failurePolicy": "Fail",
                "sideEffects": "None",
                "admissionReviewVersions": ["v1"],
                "timeoutSeconds": 2,
            }
        ],
    }

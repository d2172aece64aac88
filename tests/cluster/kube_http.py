"""The API server by plain HTTP, where kubectl would take a process, and 0.1 processor seconds, for each of thousands of calls."""

import base64
import http.client
import json
import ssl
import tempfile
import time
from collections.abc import Iterator, Sequence
from typing import Any
from urllib.parse import quote, urlsplit

from cluster.client import Cluster, KubectlError, NotThere

Object = dict[str, Any]


_configs: dict[tuple[str, int], Object] = {}
"""By the path of a kubeconfig and when it was written: a cluster that is started anew has another authority at the same place."""

_KINDS = {
    "alignmentruns": "/apis/alignment.dev/v1alpha1", "configmaps": "/api/v1", "crds": "/apis/apiextensions.k8s.io/v1",
    "deployments": "/apis/apps/v1", "jobs": "/apis/batch/v1", "leases": "/apis/coordination.k8s.io/v1", "namespaces": "/api/v1",
    "nodes": "/api/v1", "persistentvolumeclaims": "/api/v1", "pods": "/api/v1",
    "pytorchjobs": "/apis/kubeflow.org/v1", "resourcequotas": "/api/v1", "secrets": "/api/v1", "serviceaccounts": "/api/v1",
    "trainingruntimes": "/apis/trainer.kubeflow.org/v1alpha1",
    "trainjobs": "/apis/trainer.kubeflow.org/v1alpha1",
}  # fmt: skip
_OTHERWISE = {"arun": "alignmentruns"}
_LONG = {"crds": "customresourcedefinitions"}
_OF_NO_NAMESPACE = ("crds", "namespaces", "nodes")


def path_of(kind: str, *arguments: str) -> str | None:
    """Where the API server has what `kubectl get` with these arguments shows; None for what is left to kubectl."""
    plural = _OTHERWISE.get(kind, kind if kind.endswith("s") else f"{kind}s")
    names, options = _parsed(arguments)
    if plural not in _KINDS or len(names) > 1 or not options.keys() <= {"-n", "-l", "-A"}:
        return None
    everywhere = "-A" in options or plural in _OF_NO_NAMESPACE
    place = "" if everywhere else f"/namespaces/{options.get('-n', 'default')}"
    path = "/".join([f"{_KINDS[plural]}{place}/{_LONG.get(plural, plural)}", *names])
    return f"{path}?labelSelector={quote(options['-l'])}" if "-l" in options else path


def _parsed(arguments: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    names, options, rest = [], {}, iter(arguments)
    for argument in rest:
        if argument in ("-n", "-l"):
            options[argument] = next(rest)
        elif argument.startswith("-"):
            options[argument] = ""
        else:
            names.append(argument)
    return names, options


class Server:
    """Asked as the administrator, on a connection that is kept: tests ask often, and kubectl takes 0.2 s each time."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        self._connection: http.client.HTTPSConnection | None = None

    def get(self, path: str) -> Object | None:
        """None for what is not there."""
        try:
            return self._ask("GET", path)
        except NotThere:
            return None

    def items(self, path: str) -> list[Object]:
        found = self.get(path)
        return found["items"] if found else []

    def create(self, path: str, document: Object) -> Object:
        return self._ask("POST", path, document)

    def apply(self, path: str, document: Object) -> Object:
        """As `kubectl apply --server-side` and in its name."""
        return self._ask("PATCH", f"{path}?fieldManager=kubectl&fieldValidation=Strict", document, "apply-patch+yaml")

    def merge(self, path: str, changes: Object) -> Object:
        """As `kubectl patch --type=merge` and in its name."""
        return self._ask("PATCH", f"{path}?fieldManager=kubectl-patch", changes, "merge-patch+json")

    def delete(self, path: str) -> None:
        """One that is not there is an error, as to kubectl. Nobody waits until it is gone."""
        self._ask("DELETE", path, {"apiVersion": "v1", "kind": "DeleteOptions", "propagationPolicy": "Background"})

    def _ask(self, method: str, path: str, body: Object | None = None, kind: str = "json") -> Object:
        try:
            return self._answer(method, path, body, kind)
        except (OSError, http.client.HTTPException):  # it was idle for long, or the API server was started anew
            self._connection = None
            return self._answer(method, path, body, kind)

    def _answer(self, method: str, path: str, body: Object | None, kind: str) -> Object:
        """A server that has just begun says when to ask again, and kubectl does, ten times."""
        for _ in range(10):
            status, again, found = self._answered(method, path, body, kind)
            if again is None:
                break
            time.sleep(float(again))
        if status >= 400:
            error = NotThere if status == 404 else KubectlError
            raise error(f"{method} {path}: {status} {found.get('message')}")
        return found

    def _answered(self, method: str, path: str, body: Object | None, kind: str) -> tuple[int, str | None, Object]:
        """The status, the seconds until one should ask again, and the object."""
        self._connection = self._connection or connect(self.cluster)
        text = None if body is None else json.dumps(body)
        self._connection.request(method, path, text, {"Content-Type": f"application/{kind}"})
        answer = self._connection.getresponse()
        return answer.status, answer.headers["Retry-After"], json.loads(answer.read())


def connect(cluster: Cluster) -> http.client.HTTPSConnection:
    """As the administrator, whose kubeconfig has a certificate."""
    known = str(cluster.kubeconfig), cluster.kubeconfig.stat().st_mtime_ns
    if known not in _configs:
        text = cluster.kubectl("config", "view", "--raw", "--minify", "--flatten", "-o", "json")
        _configs[known] = json.loads(text)
    config = _configs[known]
    server, user = config["clusters"][0]["cluster"], config["users"][0]["user"]
    context = ssl.create_default_context(cadata=base64.b64decode(server["certificate-authority-data"]).decode())
    with tempfile.NamedTemporaryFile(suffix=".pem") as file:
        file.write(base64.b64decode(user["client-certificate-data"]) + base64.b64decode(user["client-key-data"]))
        file.flush()
        context.load_cert_chain(file.name)
    place = urlsplit(server["server"])
    return http.client.HTTPSConnection(str(place.hostname), place.port, context=context)


def stream(cluster: Cluster, path: str) -> Iterator[bytes]:
    """The lines of an answer, as they come. Raises OSError or HTTPException where the server is gone or has none."""
    connection = connect(cluster)
    connection.request("GET", path)
    answer = connection.getresponse()
    if answer.status != 200:
        raise ConnectionError(f"GET {path}: {answer.status}")
    yield from answer


def call(connection: http.client.HTTPSConnection, method: str, path: str, body: Object) -> Object:
    kind = "application/merge-patch+json" if method == "PATCH" else "application/json"
    connection.request(method, path, json.dumps(body), {"Content-Type": kind})
    answer = connection.getresponse()
    found: Object = json.loads(answer.read())
    if answer.status >= 400:
        raise RuntimeError(f"{method} {path}: {answer.status} {found.get('message')}")
    return found

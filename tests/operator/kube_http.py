"""The API server by plain HTTP, where kubectl would take a process for each of thousands of calls."""

import base64
import http.client
import json
import ssl
import tempfile
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

from cluster.client import Cluster

Object = dict[str, Any]


def connect(cluster: Cluster) -> http.client.HTTPSConnection:
    """As the administrator, whose kubeconfig has a certificate."""
    config = json.loads(cluster.kubectl("config", "view", "--raw", "--minify", "--flatten", "-o", "json"))
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

"""Which cluster, namespace and user: what kubectl would take."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from controller.api.problems import InvalidRun, Problem, nearest
from controller.commands.cluster.errors import ClusterError
from controller.commands.where import Place

if TYPE_CHECKING:
    from kubernetes.client import ApiClient, Configuration

POD_NAMESPACE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")


def connect(place: Place) -> tuple["ApiClient", str]:
    """A client and the namespace that is meant."""
    try:
        import urllib3
        from kubernetes.client import ApiClient, Configuration
    except ImportError as error:
        text = "is needed to talk to a cluster and not installed: pip install 'distributed-llm-alignment[cluster]'"
        raise InvalidRun([Problem("the package kubernetes", text)]) from error
    configuration = Configuration()
    # Retries are ours (`patience.py`): urllib3's say nothing for a minute, then print warnings.
    configuration.retries = urllib3.Retry(0)
    namespace = _load(place, configuration)
    return ApiClient(configuration), place.namespace or namespace


def _load(place: Place, configuration: "Configuration") -> str:
    """Fill in server and credentials; returns the namespace that goes with them."""
    from kubernetes.config import ConfigException, kube_config

    files = str(place.kubeconfig) if place.kubeconfig else kube_config.KUBE_CONFIG_DEFAULT_LOCATION
    try:
        merged = kube_config.KubeConfigMerger(files)
        if merged.config is None:
            return _load_of_pod(files, configuration)
        context = _context(place.context, merged.config.value, files)
        loader = kube_config.KubeConfigLoader(
            merged.config, context, config_base_path=None, config_persister=merged.save_changes
        )
        with _complaints() as said:
            loader.load_and_set(configuration)
    except InvalidRun:
        raise
    except (ConfigException, OSError) as error:
        raise InvalidRun([Problem(files, str(error))]) from error
    except Exception as error:
        raise InvalidRun([Problem(files, f"is not a kubeconfig ({type(error).__name__}: {error})")]) from error
    if said and not configuration.api_key and not configuration.cert_file:
        raise ClusterError(f"{files}: no credentials for context {context}: {said[0]}")
    return loader.current_context["context"].get("namespace") or "default"


def _context(wanted: str | None, document: dict[str, Any], files: str) -> str:
    names = [context["name"] for context in document["contexts"]]
    known = f"contexts are: {', '.join(names) or 'none'}"
    name = wanted or document.get("current-context")
    if not name:
        raise InvalidRun([Problem(files, f"has no current context: name one with --context; {known}")])
    if name not in names:
        raise InvalidRun([Problem("--context", f'no context "{name}" in {files}; {known}{nearest(name, names)}')])
    return str(name)


def _load_of_pod(files: str, configuration: "Configuration") -> str:
    """Without a kubeconfig, the service account of the pod that this runs in, if it does."""
    from kubernetes.config import ConfigException, load_incluster_config

    try:
        load_incluster_config(configuration)
    except ConfigException:
        raise InvalidRun([Problem(files, "no such kubeconfig: set KUBECONFIG or name one with --kubeconfig")]) from None
    return POD_NAMESPACE.read_text().strip() if POD_NAMESPACE.exists() else "default"


@contextmanager
def _complaints() -> Iterator[list[str]]:
    """The loader logs the failure of a credential program and goes on without credentials: that is our error to tell."""
    said: list[str] = []

    class Listen(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            said.append(" ".join(record.getMessage().split()))

    handler = Listen()
    logging.getLogger().addHandler(handler)
    try:
        yield said
    finally:
        logging.getLogger().removeHandler(handler)

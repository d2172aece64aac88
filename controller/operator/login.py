"""Who we are to the API server: the pod's service account, or a kubeconfig that was named.

Nothing is taken from a user's current context unasked: an operator that runs by mistake against the cluster of the day
would be a bad surprise.
"""

import os
from collections.abc import Callable
from pathlib import Path

import kopf

Login = Callable[[], kopf.ConnectionInfo]

SERVICE_ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")


class NoCredentials(Exception):
    """Neither in a pod, nor told which kubeconfig to use."""


def login_of(kubeconfig: Path | None) -> Login:
    """Read anew at every call: tokens are renewed in their files. Raises NoCredentials."""
    if kubeconfig is not None:
        if not kubeconfig.is_file():
            raise NoCredentials(f"--kubeconfig {kubeconfig}: no such file")
        return lambda: _from_kubeconfig(kubeconfig)
    if not (SERVICE_ACCOUNT / "token").exists():
        raise NoCredentials("not in a pod with a service account: name a kubeconfig with --kubeconfig FILE")
    return _from_service_account


def _from_service_account() -> kopf.ConnectionInfo:
    return _found(kopf.login_with_service_account(settings=kopf.OperatorSettings()), str(SERVICE_ACCOUNT))


def _from_kubeconfig(path: Path) -> kopf.ConnectionInfo:
    before = os.environ.get("KUBECONFIG")
    os.environ["KUBECONFIG"] = str(path)
    try:
        return _found(kopf.login_with_kubeconfig(settings=kopf.OperatorSettings()), str(path))
    finally:
        if before is None:
            del os.environ["KUBECONFIG"]
        else:
            os.environ["KUBECONFIG"] = before


def _found(connection: kopf.ConnectionInfo | None, where: str) -> kopf.ConnectionInfo:
    if connection is None:
        raise NoCredentials(f"no credentials in {where}")
    return connection

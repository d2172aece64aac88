"""What can go wrong on the way to a cluster, in one line each."""

import json
import re

from controller.api.text import LONG_LIMIT, plain

PASSING = (429, 500, 502, 503, 504)
"""Answers of an API server that is restarting, overloaded, or has lost a node for a moment."""

NOISE = re.compile(r"\[Errno -?\d+\] | ?\(_ssl\.c:\d+\)")


class ClusterError(Exception):
    """A cluster that does not do what it was asked for."""

    def __init__(self, message: str, code: int | None = None, passing: bool = False) -> None:
        self.code = code
        """HTTP status, if there was an answer."""
        self.passing = passing
        """May be different in a moment."""
        super().__init__(message)


def refused(server: str, code: int, reason: str, body: str | None) -> ClusterError:
    """The API server, or what stands before it, says no."""
    said = _message(body) or reason
    if code == 0:
        return unreachable(server, reason)
    if code == 401:
        text = f"{server} does not accept your credentials: log in again, or name another context (--context)"
    elif code == 403:
        text = f"not allowed: {said}"
    elif code == 404 and _message(body) is None:
        text = f"{server} knows no AlignmentRuns: install the operator (or just manifests/base/crd.yaml) first"
    else:
        text = f"{server}: {said}"
    return ClusterError(text, code, passing=code in PASSING)


def _message(body: str | None) -> str | None:
    """What a metav1.Status says; an API group that does not exist is answered with plain text."""
    try:
        found = json.loads(body or "")["message"]
    except (ValueError, KeyError, TypeError):
        return None
    return plain(str(found), LONG_LIMIT)


def unreachable(server: str, reason: str) -> ClusterError:
    """Nobody answers, or nobody who can be trusted."""
    # urllib3 names objects, hosts and ports before it comes to the point.
    point = NOISE.sub("", reason.strip().splitlines()[-1].rpartition(": ")[2]) if reason.strip() else "no answer"
    return ClusterError(f"cannot reach {server}: {point}", passing="certificate" not in reason.lower())

"""What whoever installs the operator says of the trainers' pods."""

from dataclasses import dataclass
from typing import Any

USER = 1000
"""That of the images. They run as any other too."""


@dataclass(frozen=True)
class Settings:
    image: str | None = None
    """The trainers' of runs that name none."""
    user: int | None = USER
    """User and group of pods; None leaves them to the cluster, as OpenShift wants it."""
    metrics_readers: tuple[dict[str, Any], ...] | None = None
    """Peers of a NetworkPolicy that may read metrics, everybody if there are none; None: runs have no policies."""

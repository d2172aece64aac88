"""What whoever installs the operator says of the trainers' pods."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

USER = 1000
"""That of the images. They run as any other too."""


LargestRuns = Mapping[str, Mapping[str, int]]
"""By namespace, the most that a run takes at once: of `nodes`, or of a device by the name of its resource."""


@dataclass(frozen=True)
class Settings:
    image: str | None = None
    """The trainers' of runs that name none."""
    user: int | None = USER
    """User and group of pods; None leaves them to the cluster, as OpenShift wants it."""
    metrics_readers: tuple[dict[str, Any], ...] | None = None
    """Peers of a NetworkPolicy that may read metrics, everybody if there are none; None: runs have no policies."""
    largest_runs: LargestRuns = field(default_factory=dict)
    """Namespaces without one have no limit."""

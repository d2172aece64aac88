"""Where a run's artifacts are."""

from typing import ClassVar

from pydantic import Field

from trainers.spec import SpecModel

OBJECT_NAME = r"^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$"


class Workspace(SpecModel):
    """Where artifacts are kept: exactly one of `claimName`, `uri`. Local runs use a folder instead (`--workspace`)."""

    one_of: ClassVar[tuple[str, ...]] = ("claim_name", "uri")

    claim_name: str | None = Field(default=None, pattern=OBJECT_NAME, max_length=253)
    """A PersistentVolumeClaim that every pod of the run mounts."""
    uri: str | None = Field(default=None, pattern=r"^[a-z][a-z0-9+.-]*://[^/\s][^\s]*$", max_length=1024)
    """An object store prefix, for example `s3://bucket/prefix`."""

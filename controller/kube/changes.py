"""What there is now, and what has changed since: versions of objects, for what the changes cost."""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass

from controller.kube.answers import ApiError, error_of, items, lines, object_of
from controller.kube.calls import Call
from controller.kube.resources import Object, Resource
from controller.kube.transport import Transport, selector

METADATA_ONLY = "application/json;as=PartialObjectMetadataList;g=meta.k8s.io;v=v1"
CHANGES_OF_METADATA = "application/json;as=PartialObjectMetadata;g=meta.k8s.io;v=v1"
CATCH_UP_SECONDS = 5
"""Of a watch that is to end soon. Two seconds before, the API server says how far it has told."""
CATCH_UP_PATIENCE_SECONDS = 2.0
TOO_OLD = 410


@dataclass
class Versions:
    """Of all objects of a kind, by UID."""

    found: dict[str, str]
    at: str
    """When: the resourceVersion of all together."""


class Changes:
    def __init__(self, transport: Transport) -> None:
        self.transport = transport

    async def list_versions(self, resource: Resource, namespace: str | None, labels: Mapping[str, str]) -> Versions:
        """What a watch must have told us by now."""
        versions = Versions({}, "")
        async for page in self.transport.pages(Call("list", resource), namespace, labels, METADATA_ONLY):
            metadata = [item["metadata"] for item in items(page)]
            versions.found |= {one["uid"]: one["resourceVersion"] for one in metadata}
            versions.at = versions.at or page["metadata"].get("resourceVersion", "")
        return versions

    async def catch_up(
        self, resource: Resource, namespace: str | None, labels: Mapping[str, str], versions: Versions
    ) -> bool:
        """Bring them up to now, for what the changes since then cost. False: it is not known whether these are all."""
        # An API server that has seen no change since its start does not say how far it has told. To be asked makes it look.
        await self.transport.call(Call("list", resource), namespace, None, query={"limit": "1"}, accept=METADATA_ONLY)
        with contextlib.suppress(TimeoutError):
            async with (
                asyncio.timeout(CATCH_UP_SECONDS + CATCH_UP_PATIENCE_SECONDS),
                contextlib.aclosing(self._events_since(resource, namespace, labels, versions.at)) as events,
            ):
                async for event in events:
                    if _told(event, versions):
                        return True
        return False

    async def _events_since(
        self, resource: Resource, namespace: str | None, labels: Mapping[str, str], version: str
    ) -> AsyncGenerator[Object]:
        """Without those objects, but for who they are. Ends early where the version is too old to go on from."""
        call = Call("watch", resource)
        query = {
            "watch": "1", "resourceVersion": version, "allowWatchBookmarks": "true",
            "timeoutSeconds": str(CATCH_UP_SECONDS), "labelSelector": selector(labels),
        }  # fmt: skip
        async with self.transport.request(call, namespace, None, query=query, accept=CHANGES_OF_METADATA) as response:
            if response.status == TOO_OLD:
                return
            if response.status >= 400:
                raise error_of(call, "", response, await response.text(errors="replace"))
            async for line in lines(response):
                event = object_of(call, "", response.status, line)
                if event.get("type") == "ERROR":
                    return
                if not isinstance(event.get("object"), dict) or "metadata" not in event["object"]:
                    raise ApiError(call, "", response.status, "the answer is no watch")
                yield event


def _told(event: Object, versions: Versions) -> bool:
    """Whether a watch has now told all that there is to tell."""
    metadata = event["object"]["metadata"]
    if event["type"] == "DELETED":
        versions.found.pop(metadata["uid"], None)
    elif event["type"] != "BOOKMARK":
        versions.found[metadata["uid"]] = metadata["resourceVersion"]
    versions.at = metadata["resourceVersion"]
    return bool(event["type"] == "BOOKMARK")

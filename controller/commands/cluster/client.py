"""The calls to the API server that the commands make; errors become `ClusterError`."""

import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

from controller.api import meta
from controller.api.text import plain
from controller.commands.cluster.errors import ClusterError, refused, unreachable
from controller.commands.cluster.kubeconfig import connect
from controller.commands.cluster.pods import Pod
from controller.commands.cluster.run import ClusterRun
from controller.commands.where import Place

T = TypeVar("T")

SECONDS = (10.0, 60.0)
"""To connect, and to wait for more of an answer."""
SILENCE_SECONDS = (10.0, 300.0)
"""A followed log may be silent; one that is for so long is asked for again, in case the connection is dead."""
MERGE = "application/merge-patch+json"
CONFLICT = 409


class Cluster:
    """One namespace of a cluster."""

    def __init__(self, place: Place) -> None:
        self.place = place
        self.renew()

    def renew(self) -> None:
        """Connect, with fresh credentials."""
        api, self.namespace = connect(self.place)
        from kubernetes.client import CoreV1Api, CustomObjectsApi

        self.server = str(api.configuration.host)
        # The client's types differ between its versions, and say `object` where it matters.
        self._objects: Any = CustomObjectsApi(api)
        self._core: Any = CoreV1Api(api)

    def runs(self) -> list[ClusterRun]:
        found = self._call(lambda: self._objects.list_namespaced_custom_object(*self._kind, _request_timeout=SECONDS))
        return [ClusterRun(item) for item in found["items"]]

    def run(self, name: str) -> ClusterRun | None:
        """None if there is no such run (any more)."""
        try:
            found = self._call(
                lambda: self._objects.get_namespaced_custom_object(*self._kind, name, _request_timeout=SECONDS)
            )
        except ClusterError as error:
            if error.code == 404:
                return None
            raise
        return ClusterRun(found)

    def suspend(self, name: str, wanted: bool) -> None:
        self._call(
            lambda: self._objects.patch_namespaced_custom_object(
                *self._kind, name, {"spec": {"suspend": wanted}}, _content_type=MERGE, _request_timeout=SECONDS
            )
        )

    def annotate(self, run: ClusterRun, name: str, value: str) -> bool:
        """False if the run has changed since it was read."""
        found = run.document["metadata"]
        patch = {"metadata": {"resourceVersion": found["resourceVersion"], "annotations": {name: value}}}
        try:
            self._call(
                lambda: self._objects.patch_namespaced_custom_object(
                    *self._kind, run.name, patch, _content_type=MERGE, _request_timeout=SECONDS
                )
            )
        except ClusterError as error:
            if error.code != CONFLICT:
                raise
            return False
        return True

    def pods(self, run: str, phase: str) -> list[Pod]:
        selector = f"{meta.LABEL_RUN}={run},{meta.LABEL_PHASE}={phase}"
        items = self._items(
            lambda: self._core.list_namespaced_pod(
                self.namespace, label_selector=selector, _preload_content=False, _request_timeout=SECONDS
            )
        )
        return [Pod(item) for item in items]

    def warning(self, pod: Pod) -> str:
        """The last warning about a pod; empty if there is none, or if it may not be read."""
        selector = f"involvedObject.uid={pod.uid},type=Warning"
        try:
            items = self._items(
                lambda: self._core.list_namespaced_event(
                    self.namespace, field_selector=selector, _preload_content=False, _request_timeout=SECONDS
                )
            )
        except ClusterError:
            return ""
        last = max(items, key=_time_of, default=None)
        return plain(f"{last.get('reason')}: {last.get('message')}") if last else ""

    def log(self, pod: Pod, follow: bool = False, since_seconds: int | None = None) -> Iterator[bytes]:
        """Lines as they come; with their times if they are followed."""
        response = self._call(
            lambda: self._core.read_namespaced_pod_log(
                pod.name, self.namespace, container=pod.container, follow=follow, timestamps=follow, since_seconds=since_seconds,
                _preload_content=False, _request_timeout=SILENCE_SECONDS if follow else SECONDS,
            )
        )  # fmt: skip
        lines = iter(response)
        try:
            while (line := self._call(lambda: next(lines, None))) is not None:
                yield line
        finally:
            # Not put back into the pool: there may be more to come on this connection.
            response.close()

    @property
    def _kind(self) -> tuple[str, str, str, str]:
        return meta.GROUP, meta.VERSION, self.namespace, meta.PLURAL

    def _items(self, call: Callable[[], Any]) -> list[Mapping[str, Any]]:
        """Objects as they are written: the client's own models refuse values that they do not know."""
        found: list[Mapping[str, Any]] = json.loads(self._call(lambda: call().data))["items"]
        return found

    def _call(self, call: Callable[[], T]) -> T:
        from kubernetes.client import ApiException
        from urllib3.exceptions import HTTPError

        try:
            return call()
        except ApiException as error:
            body = error.body.decode(errors="replace") if isinstance(error.body, bytes) else error.body
            raise refused(self.server, error.status or 0, str(error.reason), body) from error
        except HTTPError as error:
            raise unreachable(self.server, str(getattr(error, "reason", None) or error)) from error


def _time_of(event: Mapping[str, Any]) -> str:
    return event.get("lastTimestamp") or event.get("eventTime") or event["metadata"]["creationTimestamp"] or ""

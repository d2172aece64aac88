"""What has changed since some moment, as a real API server tells it."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import TypeVar

from cluster.client import Cluster

from controller.kube.changes import Changes, Versions
from controller.kube.resources import Resource
from controller.kube.transport import Transport
from controller.operator.login import login_of

T = TypeVar("T")
MAPS = Resource("", "v1", "configmaps")
LABELS = {"watched": "yes"}


def ask(cluster: Cluster, question: Callable[[Changes], Awaitable[T]]) -> T:
    async def go() -> T:
        transport = Transport(login_of(cluster.kubeconfig))
        try:
            return await question(Changes(transport))
        finally:
            await transport.close()

    return asyncio.run(go())


def config_map(name: str, **data: str) -> dict[str, object]:
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": name, "labels": LABELS}, "data": data}


def test_versions_are_brought_up_to_now(api_cluster: Cluster):
    """They are what a list would say, for the price of what has changed."""
    namespace = api_cluster.namespace("versions")
    api_cluster.apply([config_map("stays"), config_map("goes"), config_map("changes")], namespace)

    def listed() -> Versions:
        return ask(api_cluster, lambda changes: changes.list_versions(MAPS, namespace, LABELS))

    def caught_up(versions: Versions) -> bool:
        return ask(api_cluster, lambda changes: changes.catch_up(MAPS, namespace, LABELS, versions))

    versions = listed()
    assert len(versions.found) == 3
    # Longer than what aiohttp takes for a line.
    api_cluster.apply([config_map("changes", now="x"), config_map("comes", much="x" * 300_000)], namespace)
    api_cluster.kubectl("delete", "configmap", "goes", "-n", namespace)
    for _ in range(2):  # the second time nothing has changed, and it goes on from where it was
        # One that has just been started does not say how far it has told.
        api_cluster.wait(lambda: caught_up(versions), 180, "it says that this is all")
        assert versions.found == listed().found

"""A newer operator beside an older chart: of each right that it lacks it says once what is missed, and goes on."""

import asyncio
import logging
from collections.abc import Mapping
from typing import Any

import pytest
from pods import owner
from test_ownership import MINE, Shelf, a_job, a_run, a_run_of, backend, disowned, labelled, told

from controller.api.run import AlignmentRun
from controller.api.status import QueueState, QueueStatus
from controller.backends.cluster.rights import Rights
from controller.kube.answers import ApiError
from controller.kube.calls import Call
from controller.kube.resources import CORE_EVENTS, PYTORCHJOBS, WORKLOADS
from controller.plan.observed import Observed

Object = dict[str, Any]
USER = "system:serviceaccount:alignment-system:alignment-operator"


def refused(verb: str, resource: Any, message: str = "") -> ApiError:
    """As an API server without webhooks says it."""
    what = (
        f'{resource.plural}.{resource.group} "x" is forbidden: User "{USER}" cannot {verb} resource "{resource.plural}"'
    )
    return ApiError(
        Call(verb, resource), "x", 403, message or f'{what} in API group "{resource.group}" in the namespace "n"'
    )


def test_each_is_told_once(caplog: pytest.LogCaptureFixture):
    rights = Rights()
    error = refused("get", WORKLOADS[0])
    with caplog.at_level(logging.WARNING):
        assert [rights.lacks(error, "words are missed") for _ in range(3)] == [True] * 3
        assert rights.lacks(refused("list", WORKLOADS[0]), "more is missed")
    [get, lists] = [record.message for record in caplog.records]
    assert get == (
        f"the operator lacks a right that its version has by its chart (RBAC), and goes on without: words are missed: {error}"
    )
    assert 'cannot get resource "workloads" in API group "kueue.x-k8s.io"' in get
    assert 'cannot list resource "workloads"' in lists


@pytest.mark.parametrize(
    "error",
    [
        refused("create", PYTORCHJOBS, 'pytorchjobs.kubeflow.org "x" is forbidden: exceeded quota: none'),
        refused(
            "update", PYTORCHJOBS, f'admission webhook "h" denied the request: User "{USER}" cannot update resource "a"'
        ),
        ApiError(Call("get", PYTORCHJOBS), "x", 500, refused("get", PYTORCHJOBS).message),
    ],
)
def test_what_else_is_forbidden_is_none_of_it(error: ApiError, caplog: pytest.LogCaptureFixture):
    assert not Rights().lacks(error, "nothing")
    assert caplog.records == []


class Older(Shelf):
    """As an API server shows itself to an operator whose chart grants it less."""

    lacking: frozenset[str] = frozenset()
    tried = 0

    async def get_workload(self, namespace: str, name: str) -> Object | None:
        self._need("get")
        return await super().get_workload(namespace, name)

    async def list_workloads(self, namespace: str, labels: Mapping[str, str]) -> list[Object] | None:
        self._need("list")
        return await super().list_workloads(namespace, dict(labels))

    async def update_job(self, kind: Any, job: Object) -> Object:
        self.tried += 1
        raise refused("update", PYTORCHJOBS)

    def _need(self, verb: str) -> None:
        if verb in self.lacking:
            raise refused(verb, WORKLOADS[0])


QUEUED = a_job(MINE, labels={**labelled(), "kueue.x-k8s.io/queue-name": "gpus"})
WORKLOAD = {
    "metadata": {"name": "w", "ownerReferences": [owner("kubeflow.org/v1", "PyTorchJob", "test-sft-1", "job-1")]},
    "status": {"conditions": [{"type": "QuotaReserved", "status": "False", "message": "no room"}]},
}
KNOWN = QueueStatus(state=QueueState.PENDING, message="no room", workload="w")


def looks(shelf: Older, run: AlignmentRun, times: int = 2) -> Observed:
    asked = backend(shelf)
    for _ in range(times):
        found = asyncio.run(asked.observe(run))
    return found


@pytest.mark.parametrize(
    ("lacking", "before", "said", "missed"),
    [
        ("get", KNOWN, KNOWN, ["Workloads are listed for each job that waits, which costs the API server more"]),
        ("get list", None, None, ["runs do not say what they wait for in a queue"]),
        (
            "get list",
            QueueStatus(state=QueueState.EVICTED, message="why", workload="w"),
            QueueStatus(state=QueueState.EVICTED, message="why", workload="w"),
            [
                "Workloads are listed for each job that waits, which costs the API server more",
                "runs do not say what they wait for in a queue",
            ],
        ),
    ],
    ids=["to get", "to get and list", "to get and list, and something was said before"],
)
def test_of_workloads(
    lacking: str,
    before: QueueStatus | None,
    said: QueueStatus | None,
    missed: list[str],
    caplog: pytest.LogCaptureFixture,
):
    """The look ended with the answer, again and again, and nothing of the run was done."""
    shelf = Older(QUEUED, workloads=(WORKLOAD,))
    shelf.lacking = frozenset(lacking.split())
    with caplog.at_level(logging.WARNING):
        [found] = looks(shelf, told(before) if before else a_run()).jobs
    assert found.queue == said
    assert [r.message.split(" goes on without: ")[1].split(":")[0] for r in caplog.records] == missed


def test_to_update_jobs(caplog: pytest.LogCaptureFixture):
    shelf, run = Older(disowned()), a_run_of()
    asked = backend(shelf)
    [found] = asyncio.run(asked.observe(run)).jobs
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            asyncio.run(asked.reclaim(run, found))
    assert (shelf.tried, len(caplog.records)) == (3, 1)
    assert "a job that somebody takes the owner reference from stays without, and its run's" in caplog.text


def test_to_list_events(caplog: pytest.LogCaptureFixture):
    class Silent(Older):
        async def list_warnings(self, namespace: str, uid: str) -> list[Object]:
            raise refused("list", CORE_EVENTS)

    with caplog.at_level(logging.WARNING):
        [found] = looks(Silent(a_job(MINE)), a_run()).jobs
    assert (found.message, len(caplog.records)) == ("", 1)
    assert "runs do not say why pods are not made or mounted" in caplog.text

"""The run of `helm test`: it makes its own, and deletes no other."""

import asyncio
from typing import Any

import pytest
from builders import document, sft

from controller.operator import smoke
from controller.operator.smoke import MARK, DidNotSucceed

SUCCEEDED = {"type": "Succeeded", "status": "True", "reason": "x", "lastTransitionTime": "2026-01-01T00:00:00Z"}
RUN = {**document(sft("base")), "metadata": {"name": "op-test", "namespace": "team"}}


class Server:
    def __init__(self, there: dict[str, Any] | None) -> None:
        self.there = there
        self.deleted: list[str] = []

    async def get_run(self, namespace: str, name: str) -> dict[str, Any] | None:
        return self.there

    async def create_run(self, run: dict[str, Any]) -> dict[str, Any]:
        self.there = {**run, "metadata": {**run["metadata"], "uid": "new"}, "status": {"conditions": [SUCCEEDED]}}
        return self.there

    async def delete_run(self, namespace: str, name: str, uid: str) -> None:
        assert self.there is not None
        assert self.there["metadata"]["uid"] == uid
        self.deleted.append(uid)
        self.there = None


def carry_out(server: Any) -> None:
    asyncio.run(smoke._smoke(server, RUN, timeout=60))


def an_earlier_one(**annotations: str) -> dict[str, Any]:
    return {**RUN, "metadata": {**RUN["metadata"], "uid": "old", "annotations": annotations}}


def test_a_run_of_somebody_elses_is_left_alone_and_told():
    server = Server(an_earlier_one())
    with pytest.raises(DidNotSucceed, match="is no test's run: delete it, or give the test another name"):
        carry_out(server)
    assert server.deleted == []


def test_one_that_an_earlier_test_left_makes_way(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(smoke, "EVERY_SECONDS", 0.0)
    server = Server(an_earlier_one(**{MARK: "true"}))
    carry_out(server)
    assert server.deleted == ["old", "new"]
    server = Server(None)
    carry_out(server)
    assert server.deleted == ["new"]

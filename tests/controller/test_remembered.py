"""What is kept of what the watches deliver: small, newest, and by run; and what is news."""

import asyncio
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pods import job, owner, pod

from controller.api import meta
from controller.kube.resources import PODS, PYTORCHJOBS, RUNS
from controller.memory import GONE_KEPT, Anew, Key, Memory, Shelf
from controller.projection import POD, pack, project

Object = dict[str, Any]
KEY = Key("ns", "test")


def a_run(version: int = 1, uid: str = "u", **more: Any) -> Object:
    metadata = {"namespace": "ns", "name": "test", "uid": uid, "resourceVersion": str(version), "managedFields": [{}]}
    return {"metadata": metadata, "spec": {"phases": []}, **more}


def child(thing: Object, version: int = 1, run: str = "test", **more: Any) -> Object:
    metadata = {**thing["metadata"], "namespace": "ns", "resourceVersion": str(version), **more}
    return {**thing, "metadata": {**metadata, "labels": {**metadata["labels"], meta.LABEL_RUN: run}}}


class Server:
    """Answers with what it has, however old that is."""

    def __init__(self, *jobs: Object) -> None:
        self.jobs = jobs

    async def list_jobs(self, kind, namespace: str, labels: Object) -> list[Object]:
        return list(self.jobs)


def memory(*jobs: Object) -> Memory:
    api: Any = Server(*jobs)
    return Memory(api)


class TestNews:
    def test_what_differs_in_something_that_is_read(self):
        held = memory()
        assert held.event(PODS, None, child(pod(), 1)) == KEY
        assert held.event(PODS, "MODIFIED", child(pod(), 2, annotations={"a": "b"})) is None
        assert held.event(PODS, "MODIFIED", child(pod(phase="Failed"), 3)) == KEY
        assert held.event(PODS, "DELETED", child(pod(phase="Failed"), 4)) == KEY
        assert held.event(PODS, "DELETED", child(pod(phase="Failed"), 4)) is None

    def test_what_we_wrote_ourselves_is_none(self):
        held = memory()
        held.event(RUNS, None, a_run(1))
        held.saw(RUNS, [a_run(7, status={"phase": "Running"})])
        found = held.run(KEY)
        assert found is not None
        assert (found["status"], found["metadata"]["resourceVersion"]) == ({"phase": "Running"}, "7")
        assert held.event(RUNS, "MODIFIED", a_run(7, status={"phase": "Running"})) is None
        assert held.event(RUNS, "MODIFIED", a_run(8, status={"phase": "Running", "novelty": 1})) == KEY

    def test_what_the_watch_tells_late_undoes_nothing(self):
        held = memory()
        held.saw(RUNS, [a_run(7, status={"phase": "Running"})])
        assert held.event(RUNS, None, a_run(3)) is None
        assert held.run(KEY)["status"] == {"phase": "Running"}

    def test_an_answer_that_comes_after_the_end_brings_nothing_back(self):
        held = memory()
        held.event(PYTORCHJOBS, "ADDED", child(job(), 1))
        held.event(PYTORCHJOBS, "DELETED", child(job(), 5))
        held.saw(PYTORCHJOBS, [child(job(), 4)])
        assert asyncio.run(held.list_jobs(PYTORCHJOBS, "ns", {meta.LABEL_RUN: "test"})) == []
        assert held.event(PYTORCHJOBS, "ADDED", child(job(), 6)) == KEY, "its labels were taken away and given back"

    def test_something_without_a_run_wakes_nobody_and_is_known(self):
        held = memory()
        assert held.event(PODS, "ADDED", {"metadata": {**child(pod())["metadata"], "labels": {}}}) is None
        assert held.shelves[PODS].version("pod-0") == "1"


class TestRuns:
    def test_each_has_its_own(self):
        held = memory()
        for name in ("test", "other"):
            held.event(PYTORCHJOBS, "ADDED", child(job(), run=name, uid=f"{name}-2", name=f"{name}-2"))
            held.event(PYTORCHJOBS, "ADDED", child(job(), run=name, uid=f"{name}-1", name=f"{name}-1"))
        found = asyncio.run(held.list_jobs(PYTORCHJOBS, "ns", {meta.LABEL_RUN: "test"}))
        assert [one["metadata"]["name"] for one in found] == ["test-1", "test-2"]
        assert asyncio.run(held.list_jobs(PYTORCHJOBS, "elsewhere", {meta.LABEL_RUN: "test"})) == []

    def test_one_that_is_given_to_another_run_leaves_the_first(self):
        held = memory()
        held.event(PYTORCHJOBS, "ADDED", child(job(), 1))
        assert held.event(PYTORCHJOBS, "MODIFIED", child(job(), 2, run="other")) == Key("ns", "other")
        assert asyncio.run(held.list_jobs(PYTORCHJOBS, "ns", {meta.LABEL_RUN: "test"})) == []

    def test_of_two_of_one_name_the_younger_counts(self):
        held = memory()
        for uid, born in (("new", "2026-02-01T00:00:00Z"), ("old", "2026-01-01T00:00:00Z")):
            document = a_run(1, uid)
            held.event(RUNS, "ADDED", {**document, "metadata": {**document["metadata"], "creationTimestamp": born}})
        assert held.run(KEY)["metadata"]["uid"] == "new"


def test_what_is_read_anew_is_remembered():
    ended = child(job("Failed"), 9)
    held = memory(ended)
    held.event(PYTORCHJOBS, "ADDED", child(job(), 1))
    asyncio.run(Anew(held.api, held).list_jobs(PYTORCHJOBS, "ns", {meta.LABEL_RUN: "test"}))
    assert held.event(PYTORCHJOBS, "MODIFIED", ended) is None


@given(st.lists(st.tuples(st.integers(0, 3), st.booleans(), st.booleans()), max_size=40), st.randoms())
def test_in_whatever_order_things_are_told_the_newest_stays(writes, random):
    """Own answers and the watch's events of one object, mixed; each is told once or twice."""
    told = [(number, end) for number, (_, end, _) in enumerate(writes, 1)]
    told += [(number, end) for number, (_, end, twice) in enumerate(writes, 1) if twice]
    random.shuffle(told)
    shelf, ends = Shelf(RUNS), [number for number, end in told if end]
    for number, end in told:
        if end:
            shelf.remove("u", str(number))
        else:
            shelf.put(a_run(number))
    last = told[-1] if told else (0, False)
    if not ends and told:
        assert shelf.version("u") == str(max(number for number, _ in told))
    if last[1]:
        assert shelf.version("u") is None


def test_only_so_many_ends_are_remembered():
    shelf = Shelf(PODS)
    for number in range(GONE_KEPT + 10):
        shelf.remove(str(number), "1")
    assert len(shelf._gone) == GONE_KEPT


@pytest.mark.parametrize(("resource", "thing", "most"), [(PODS, pod(), 420), (PYTORCHJOBS, job(), 420)])
def test_little_is_kept(resource, thing, most):
    """Bytes of a pod or a job that goes well."""
    full = child(thing, ownerReferences=[owner("kubeflow.org/v1", "PyTorchJob", "test-sft-1", "0" * 36)], uid="0" * 36)
    assert len(pack(resource, full)) < most


def test_a_projection_has_the_shape_of_its_object():
    full = {
        "metadata": {"name": "a", "managedFields": [1]},
        "status": {"conditions": [{"type": "t", "lastProbeTime": 1}]},
    }
    assert project(full, POD) == {"metadata": {"name": "a"}, "status": {"conditions": [{"type": "t"}]}}
    assert project({"status": {"conditions": None}}, POD) == {"status": {"conditions": None}}

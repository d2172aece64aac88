"""Whether a dead watch is told from a quiet one, a slow one and an API server that is away."""

import asyncio
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import pytest
from hypothesis import given
from hypothesis import strategies as st
from virtual_time import run

from controller.kube.answers import ApiError
from controller.kube.calls import Call
from controller.kube.changes import Versions
from controller.kube.resources import PODS, RUNS, Resource
from controller.memory import Key, Shelf
from controller.operator.meter import OperatorMetrics
from controller.operator.watchdog import Watch, Watchdog

Listing = dict[str, str]


def deliver(shelf: Shelf, kind: str, uid: str, version: str) -> None:
    metadata = {"uid": uid, "resourceVersion": version, "namespace": "one", "name": uid}
    if kind == "DELETED":
        shelf.remove(uid, version)
    else:
        shelf.put({"metadata": metadata})


def verdicts(*rounds: tuple[Listing, Listing]) -> list[bool]:
    """For each round: what the watch has delivered since the last one, and what is listed."""
    watch = Watch(Shelf(RUNS))
    answers = []
    for delivered, listed in rounds:
        for uid, version in delivered.items():
            deliver(watch.shelf, "MODIFIED", uid, version)
        answers.append(watch.compare(listed))
    return answers


LIVES = {
    "nothing happens": [({"a": "1"}, {"a": "1"})] * 4,
    "it lags behind by less than a round": [({"a": "1"}, {"a": "2"}), ({"a": "2"}, {"a": "2"})],
    "it lags behind, but it delivers": [({"a": "1"}, {"a": "5"}), ({"a": "3"}, {"a": "9"}), ({"a": "7"}, {"a": "12"})],
    "what it did not tell of is gone": [({"a": "1"}, {"a": "2"}), ({}, {}), ({}, {})],
    "it has not told of something new yet": [({"a": "1"}, {"a": "1", "b": "2"}), ({"b": "2"}, {"a": "1", "b": "2"})],
}
DEAD = {
    "a change is never delivered": [({"a": "1"}, {"a": "2"}), ({}, {"a": "2"})],
    "changes go on undelivered": [({"a": "1"}, {"a": "2"}), ({}, {"a": "3"})],
    "something new is never delivered": [({}, {"a": "1"}), ({}, {"a": "1"})],
    "one of many": [({"a": "1", "b": "1"}, {"a": "1", "b": "2"}), ({"a": "3"}, {"a": "3", "b": "2"})],
}


@pytest.mark.parametrize("sentence", LIVES)
def test_lives(sentence):
    assert all(verdicts(*LIVES[sentence]))


@pytest.mark.parametrize("sentence", DEAD)
def test_dead(sentence):
    first, second = verdicts(*DEAD[sentence])
    assert (first, second) == (True, False), "a round's time to deliver, and no more"


def test_a_dead_watch_stays_dead_until_it_delivers_again():
    missed = ({}, {"a": "2"})
    assert verdicts(({"a": "1"}, {"a": "2"}), missed, missed, ({"a": "2"}, {"a": "2"})) == [True, False, False, True]


def test_a_deleted_object_made_again_is_another():
    watch = Watch(Shelf(RUNS))
    deliver(watch.shelf, "ADDED", "a", "1")
    deliver(watch.shelf, "DELETED", "a", "2")
    deliver(watch.shelf, "ADDED", "b", "3")
    assert {uid: record.version for uid, record in watch.shelf.records.items()} == {"b": "3"}
    assert watch.compare({"b": "3"})
    assert watch.compare({"b": "3"})


@given(st.lists(st.tuples(st.sampled_from("abc"), st.booleans()), max_size=60), st.integers(1, 8))
def test_one_that_delivers_within_a_round_is_never_called_dead(writes, every):
    """Half of the events have come when the comparison is made, the rest soon after it."""
    watch, stored, born, late = Watch(Shelf(RUNS)), {}, dict.fromkeys("abc", 0), []
    for number, (name, deleted) in enumerate(writes):
        uid, version = f"{name}{born[name]}", str(number)
        if deleted and uid in stored:
            del stored[uid]
            born[name] += 1  # an object of the same name has another uid
            late.append(("DELETED", uid, version))
        else:
            stored[uid] = version
            late.append(("MODIFIED", uid, version))
        if number % every == 0:
            for event in late[: len(late) // 2]:
                deliver(watch.shelf, *event)
            assert watch.compare(dict(stored))
            for event in late[len(late) // 2 :]:
                deliver(watch.shelf, *event)
            late = []


@dataclass
class Lister:
    """Stands for the API server."""

    versions: dict[str, Listing] = field(default_factory=lambda: {"alignmentruns": {}, "pods": {}})
    asked: list[str | None] = field(default_factory=list)
    away: bool = False
    forbidden: str = ""
    """A namespace that is deleted, and the Role in it with it."""

    lists: int = 0
    tells: bool = False
    """Whether it can say what has changed since."""

    async def list_versions(self, resource: Resource, namespace: str | None, labels: dict[str, str]) -> Versions:
        self.lists += 1
        return Versions(await self._now(resource, namespace), "")

    async def catch_up(self, resource: Resource, namespace: str | None, _: dict[str, str], versions: Versions) -> bool:
        versions.found = await self._now(resource, namespace)
        return self.tells

    async def _now(self, resource: Resource, namespace: str | None) -> Listing:
        self.asked.append(namespace)
        if self.away:
            raise aiohttp.ClientConnectionError
        if namespace == self.forbidden:
            raise ApiError(Call("list", resource), "", 403, "forbidden")
        return dict(self.versions[resource.plural])


def test_a_deleted_namespace_does_not_hide_a_dead_watch_in_the_others():
    async def go():
        api = Lister(forbidden="gone")
        dog = Watchdog(api, [Watch(Shelf(RUNS)), Watch(Shelf(PODS))], ["gone", "two"], every=60)
        guard = asyncio.create_task(dog.guard())
        api.versions["pods"]["p"] = "1"
        await asyncio.sleep(150)
        guard.cancel()
        return dog.dead

    assert run(go()) == ("pods",)


def test_the_guard_names_the_dead_and_takes_it_back():
    async def go():
        api, measured = Lister(), OperatorMetrics()
        watches, places = [Watch(Shelf(RUNS)), Watch(Shelf(PODS))], ["one", "two"]
        dog = Watchdog(api, watches, places, every=60, told=measured.watches)
        guard = asyncio.create_task(dog.guard())
        api.versions["pods"]["p"] = "1"
        await asyncio.sleep(90)
        assert dog.dead == ()
        await asyncio.sleep(60)
        assert dog.dead == ("pods",)
        assert (served(measured, "alignmentruns"), served(measured, "pods")) == (0, 1)
        assert set(api.asked) == {"one", "two"}
        api.away = True
        await asyncio.sleep(120)
        assert dog.dead == ("pods",), "nothing is known while the API server is away"
        api.away = False
        deliver(watches[1].shelf, "ADDED", "p", "1")
        await asyncio.sleep(60)
        assert dog.dead == ()
        assert served(measured, "pods") == 0
        guard.cancel()

    run(go())


def served(measured: OperatorMetrics, resource: str) -> float | None:
    return measured.registry.get_sample_value("alignment_operator_watch_dead", {"resource": resource})


def test_an_api_server_that_is_away_is_not_the_watches_fault():
    async def go():
        api = Lister(away=True)
        dog = Watchdog(api, [Watch(Shelf(RUNS))], [None], every=60)
        guard = asyncio.create_task(dog.guard())
        await asyncio.sleep(600)
        assert dog.dead == ()
        assert not guard.done()
        guard.cancel()

    run(go())


def test_what_is_gone_without_a_word_is_forgotten_and_its_run_looked_at():
    """kopf lists anew when it has lost its place, and does not tell of what was deleted meanwhile."""

    async def go():
        api, again = Lister(), []
        watch = Watch(Shelf(RUNS))
        deliver(watch.shelf, "ADDED", "ghost", "1")
        deliver(watch.shelf, "ADDED", "there", "2")
        api.versions["alignmentruns"] = {"there": "2"}
        dog = Watchdog(api, [watch], [None], every=60, look_again=again.append)
        guard = asyncio.create_task(dog.guard())
        await asyncio.sleep(90)
        assert again == [], "the watch may be about to tell"
        await asyncio.sleep(60)
        guard.cancel()
        return again, list(watch.shelf.records), dog.dead

    assert run(go()) == ([Key("one", "ghost")], ["there"], ())


def test_what_cannot_be_listed_is_not_taken_for_gone():
    async def go():
        api = Lister(forbidden="one")
        watch = Watch(Shelf(RUNS))
        deliver(watch.shelf, "ADDED", "a", "1")
        dog = Watchdog(api, [watch], ["one", "two"], every=60)
        guard = asyncio.create_task(dog.guard())
        await asyncio.sleep(300)
        guard.cancel()
        return list(watch.shelf.records)

    assert run(go()) == ["a"]


def test_work_begins_when_all_that_is_there_is_known():
    """A look before that would find jobs without their pods."""

    async def go():
        api = Lister(away=True)
        watch = Watch(Shelf(PODS))
        api.versions["pods"] = {"a": "3", "b": "4"}
        dog = Watchdog(api, [watch], [None])
        known = asyncio.create_task(dog.until_known([PODS]))
        await asyncio.sleep(10)
        api.away = False
        deliver(watch.shelf, "ADDED", "a", "3")
        deliver(watch.shelf, "ADDED", "b", "2")
        await asyncio.sleep(10)
        assert not known.done()
        deliver(watch.shelf, "DELETED", "b", "5")
        await asyncio.sleep(1)
        return known.done()

    assert run(go())


def test_work_begins_though_everything_changes_all_the_time():
    """And though something was deleted before the watch began."""

    async def go():
        api, watch = Lister(), Watch(Shelf(PODS))
        api.versions["pods"] = {"a": "0", "gone": "1"}
        dog = Watchdog(api, [watch], [None])

        async def change():
            for version in range(1, 1000):
                deliver(watch.shelf, "MODIFIED", "a", str(2 * version))
                api.versions["pods"] = {"a": str(2 * version + 2)} | ({"gone": "1"} if version < 5 else {})
                await asyncio.sleep(1)

        changes = asyncio.create_task(change())
        await asyncio.wait_for(dog.until_known([PODS]), 60)
        changes.cancel()

    run(go())


def test_kinds_that_are_not_there_are_asked_for_no_more():
    told: list[tuple[list[str], list[str]]] = []
    api: Any = None
    watchdog = Watchdog(
        api, [Watch(Shelf(RUNS)), Watch(Shelf(PODS))], (None,), told=lambda all_, dead: told.append(([*all_], [*dead]))
    )
    watchdog.leave_out({PODS})
    assert list(watchdog.watches) == [RUNS]
    assert told[-1] == (["alignmentruns"], [])


def test_what_there_is_is_listed_once():
    """Then it is told what has changed; after a moment in which that could not be said, it is listed again."""

    async def go():
        api, watch = Lister(tells=True), Watch(Shelf(RUNS))
        dog = Watchdog(api, [watch], [None], every=60)
        guard = asyncio.create_task(dog.guard())
        await asyncio.sleep(630)
        assert api.lists == 1
        api.tells = False
        await asyncio.sleep(60)
        api.tells = True
        api.versions["alignmentruns"]["late"] = "7"
        await asyncio.sleep(60)
        assert (api.lists, dog.dead) == (2, ())
        await asyncio.sleep(60)
        assert dog.dead == ("alignmentruns",)
        guard.cancel()

    run(go())

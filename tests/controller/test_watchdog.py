"""Whether a dead watch is told from a quiet one, a slow one and an API server that is away."""

import asyncio
from dataclasses import dataclass, field

import aiohttp
import pytest
from hypothesis import given
from hypothesis import strategies as st
from virtual_time import run

from controller.kube import PODS, RUNS, ApiError, Call, Resource
from controller.operator.meter import OperatorMetrics
from controller.operator.watchdog import Watch, Watchdog

Listing = dict[str, str]


def verdicts(*rounds: tuple[Listing, Listing]) -> list[bool]:
    """For each round: what the watch has delivered since the last one, and what is listed."""
    watch = Watch(RUNS)
    answers = []
    for delivered, listed in rounds:
        for uid, version in delivered.items():
            watch.event("MODIFIED", uid, version)
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
    watch = Watch(RUNS)
    watch.event("ADDED", "a", "1")
    watch.event("DELETED", "a", "2")
    watch.event("ADDED", "b", "3")
    assert watch.seen == {"b": "3"}
    assert watch.compare({"b": "3"})
    assert watch.compare({"b": "3"})


@given(st.lists(st.tuples(st.sampled_from("abc"), st.booleans()), max_size=60), st.integers(1, 8))
def test_one_that_delivers_within_a_round_is_never_called_dead(writes, every):
    """Half of the events have come when the comparison is made, the rest soon after it."""
    watch, stored, born, late = Watch(RUNS), {}, dict.fromkeys("abc", 0), []
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
                watch.event(*event)
            assert watch.compare(dict(stored))
            for event in late[len(late) // 2 :]:
                watch.event(*event)
            late = []


@dataclass
class Lister:
    """Stands for the API server."""

    versions: dict[str, Listing] = field(default_factory=lambda: {"alignmentruns": {}, "pods": {}})
    asked: list[str | None] = field(default_factory=list)
    away: bool = False
    forbidden: str = ""
    """A namespace that is deleted, and the Role in it with it."""

    async def list_versions(self, resource: Resource, namespace: str | None, labels: dict[str, str]) -> Listing:
        self.asked.append(namespace)
        if self.away:
            raise aiohttp.ClientConnectionError
        if namespace == self.forbidden:
            raise ApiError(Call("list", resource), "", 403, "forbidden")
        return dict(self.versions[resource.plural])


def test_a_deleted_namespace_does_not_hide_a_dead_watch_in_the_others():
    async def go():
        api = Lister(forbidden="gone")
        dog = Watchdog(api, [Watch(RUNS), Watch(PODS)], ["gone", "two"], every=60)  # type: ignore[arg-type]
        guard = asyncio.create_task(dog.guard())
        api.versions["pods"]["p"] = "1"
        await asyncio.sleep(150)
        guard.cancel()
        return dog.dead

    assert run(go()) == ("pods",)


def test_the_guard_names_the_dead_and_takes_it_back():
    async def go():
        api, measured = Lister(), OperatorMetrics()
        watches, places = [Watch(RUNS), Watch(PODS)], ["one", "two"]
        dog = Watchdog(api, watches, places, every=60, told=measured.watches)  # type: ignore[arg-type]
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
        dog.event("pods", "ADDED", "p", "1")
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
        dog = Watchdog(api, [Watch(RUNS)], [None], every=60)  # type: ignore[arg-type]
        guard = asyncio.create_task(dog.guard())
        await asyncio.sleep(600)
        assert dog.dead == ()
        assert not guard.done()
        guard.cancel()

    run(go())

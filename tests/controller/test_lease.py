"""Two replicas and one lease: never two that act, and always one soon."""

import asyncio
import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from typing import Any

import aiohttp
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from virtual_time import now, run

from controller.kube.answers import ApiError, Conflict
from controller.kube.calls import Call
from controller.kube.resources import LEASES
from controller.operator import lease
from controller.operator.lease import LeaderElection, LeadershipLost, LeaseTimes

TIMES = LeaseTimes()
Trouble = tuple[float, float, bool]
"""Of one call: seconds until it arrives, seconds until its answer does, and whether the answer is lost."""
FINE: Trouble = (0.01, 0.01, False)


@dataclass
class Server:
    """One lease, with optimistic concurrency."""

    stored: dict[str, Any] | None = None
    version: int = 0
    down: bool = False

    def get(self) -> dict[str, Any] | None:
        return copy.deepcopy(self.stored)

    def write(self, verb: str, document: dict[str, Any]) -> dict[str, Any]:
        known = (self.stored or {}).get("metadata", {}).get("resourceVersion")
        if document["metadata"].get("resourceVersion") != known:
            raise Conflict(Call(verb, LEASES), "lease", 409, "the object has been modified")
        self.version += 1
        self.stored = copy.deepcopy(document)
        self.stored["metadata"]["resourceVersion"] = str(self.version)
        return copy.deepcopy(self.stored)


@dataclass
class Line:
    """One replica's connection to it."""

    server: Server
    troubles: Iterator[Trouble] = field(default_factory=lambda: iter(()))

    async def get_lease(self, namespace: str, name: str) -> dict[str, Any] | None:
        return await self._call(self.server.get)

    async def create_lease(self, document: dict[str, Any]) -> dict[str, Any]:
        return await self._call(lambda: self.server.write("create", document))

    async def update_lease(self, document: dict[str, Any]) -> dict[str, Any]:
        return await self._call(lambda: self.server.write("update", document))

    async def _call(self, work: Callable[[], Any]) -> Any:
        there, back, lost = next(self.troubles, FINE)
        arrival = asyncio.get_running_loop().create_task(self._arrive(there, work))
        # Who gives up waiting does not call back what is on its way.
        outcome = await asyncio.shield(arrival)
        await asyncio.sleep(back)
        if lost:
            raise aiohttp.ClientConnectionError("connection reset")
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    async def _arrive(self, there: float, work: Callable[[], Any]) -> Any:
        await asyncio.sleep(there)
        if self.server.down:
            return aiohttp.ClientConnectionError("connection refused")
        try:
            return work()
        except ApiError as error:
            return error


@dataclass
class Replica:
    name: str
    line: Line
    acts: list[tuple[float, float]] = field(default_factory=list)
    """From when to when it believed that it holds the lease."""
    since: float | None = None
    times: LeaseTimes = TIMES

    def elector(self) -> LeaderElection:
        return LeaderElection(self.line, "ns", self.name, self.times, clock=now)  # type: ignore[arg-type]

    async def live(self) -> None:
        """As the process does; when it loses the lease it ends and its pod starts again."""
        while True:
            election = self.elector()
            await election.acquire()
            self.since = now()
            try:
                await election.hold()
            except LeadershipLost:
                pass
            finally:
                self.acts.append((self.since, now()))
                self.since = None


def holder(server: Server) -> str:
    return str((server.stored or {})["spec"]["holderIdentity"])


async def for_a_while(seconds: float, *replicas: Replica) -> None:
    tasks = [asyncio.create_task(replica.live()) for replica in replicas]
    await asyncio.sleep(seconds)
    for task in tasks:
        task.cancel()
    _, left = await asyncio.wait(tasks, timeout=60)
    assert not left, "SIGTERM is heard whatever it interrupts"


def assert_never_two(*replicas: Replica) -> None:
    acts = sorted((start, end, replica.name) for replica in replicas for start, end in replica.acts)
    for (_, end, one), (start, _, other) in pairwise(acts):
        assert end <= start or one == other, f"{one} acts until {end}, {other} from {start}"


DELAYS = st.sampled_from([0.0, 0.01, 0.5, 2.0, 4.9, 5.1, 9.0, 14.0, 20.0])
TROUBLES = st.lists(st.tuples(DELAYS, DELAYS, st.booleans()) | st.just(FINE), max_size=40)


@settings(max_examples=100, deadline=None)
@given(TROUBLES, TROUBLES)
def test_never_two_whatever_the_network_does(one: list[Trouble], other: list[Trouble]) -> None:
    async def go() -> None:
        server = Server()
        a, b = Replica("a", Line(server, iter(one))), Replica("b", Line(server, iter(other)))
        await for_a_while(400, a, b)
        assert_never_two(a, b)

    run(go())


def test_the_first_takes_it_and_keeps_it() -> None:
    async def go() -> None:
        server = Server()
        a, b = Replica("a", Line(server)), Replica("b", Line(server))
        await for_a_while(3600, a, b)
        assert {len(a.acts), len(b.acts)} == {0, 1}
        assert server.stored is not None
        assert server.stored["spec"]["leaseTransitions"] == 1

    run(go())


def test_a_lease_of_our_own_from_a_backup_ends_the_leadership() -> None:
    """What is remembered of the cluster has not been: the process is to start anew."""

    async def go() -> None:
        server = Server()
        election = Replica("a", Line(server)).elector()
        await election.acquire()
        holding = asyncio.create_task(election.hold())
        await asyncio.sleep(60)
        backup = server.get()
        await asyncio.sleep(60)
        assert not holding.done()
        assert backup is not None
        server.stored = backup
        with pytest.raises(LeadershipLost, match="a backup was restored"):
            await asyncio.wait_for(holding, TIMES.renew_deadline)
        assert await Replica("a", Line(server)).elector()._safely_try(), "started anew it goes on at once"

    run(go())


def test_another_takes_over_when_the_holder_is_silent_and_no_earlier() -> None:
    async def go() -> None:
        server = Server()
        a, b = Replica("a", Line(server)), Replica("b", Line(server))
        first = asyncio.create_task(a.live())
        await asyncio.sleep(60)
        second = asyncio.create_task(b.live())
        await asyncio.sleep(30)
        silent = now()
        first.cancel()  # like a machine that loses power
        await asyncio.sleep(60)
        second.cancel()
        await asyncio.gather(first, second, return_exceptions=True)
        [(taken, _)] = b.acts
        assert TIMES.duration - TIMES.retry - 1 <= taken - silent <= TIMES.duration + TIMES.retry + 1
        assert holder(server) == "b"

    run(go())


def test_a_release_hands_it_over_at_once() -> None:
    async def go() -> None:
        server = Server()
        first = Replica("a", Line(server)).elector()
        await first.acquire()
        second = asyncio.create_task(Replica("b", Line(server)).elector().acquire())
        await asyncio.sleep(5)
        assert holder(server) == "a"
        began = now()
        await first.release()
        await second
        assert now() - began <= TIMES.retry + 1
        assert holder(server) == "b"

    run(go())


def test_what_another_holds_is_not_released() -> None:
    async def go() -> None:
        server = Server()
        a, b = Replica("a", Line(server)).elector(), Replica("b", Line(server)).elector()
        await a.acquire()
        await a.release()
        await b.acquire()
        await a.release()  # says so in the log, and that is all
        assert holder(server) == "b"

    run(go())


@pytest.mark.parametrize("hours", [-24, 24])
def test_clocks_that_differ_do_not_matter(monkeypatch: pytest.MonkeyPatch, hours: int) -> None:
    """The record's times are for people; who waits counts from when the record has changed."""

    class Skewed(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> Any:
            moment = datetime(2026, 1, 1, tzinfo=UTC) + timedelta(seconds=now())
            task = asyncio.current_task()
            return moment + timedelta(hours=hours if task and task.get_name() == "a" else 0)

    async def go() -> None:
        monkeypatch.setattr(lease, "datetime", Skewed)
        server = Server()
        a, b = Replica("a", Line(server)), Replica("b", Line(server))
        tasks = [asyncio.create_task(r.live(), name=r.name) for r in (a, b)]
        await asyncio.sleep(600)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert_never_two(a, b)
        assert len(a.acts) + len(b.acts) == 1

    run(go())


def test_the_holder_gives_up_when_the_server_is_away_and_comes_back_with_it() -> None:
    async def go() -> None:
        server = Server()
        a = Replica("a", Line(server))
        task = asyncio.create_task(a.live())
        await asyncio.sleep(30)
        server.down, went = True, now()
        await asyncio.sleep(60)
        [(_, ended)] = a.acts
        assert TIMES.renew_deadline - TIMES.retry - 1 <= ended - went <= TIMES.renew_deadline
        server.down = False
        await asyncio.sleep(10)
        assert a.since is not None
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    run(go())


def test_an_answer_that_comes_late_does_not_stretch_the_lease() -> None:
    """The write counts from when it was sent, and the last attempt is over before the others may act."""
    silent = [FINE, (0.0, 4.9, False), *[(20.0, 0.0, True)] * 30]

    async def go() -> None:
        server = Server()
        a, b = Replica("a", Line(server, iter([FINE, FINE, *silent]))), Replica("b", Line(server))
        await for_a_while(60, a, b)
        assert_never_two(a, b)
        assert b.acts

    run(go())


def test_the_record_is_as_other_tools_expect_it() -> None:
    async def go() -> None:
        server = Server()
        await Replica("a", Line(server)).elector().acquire()
        assert server.stored is not None
        spec = server.stored["spec"]
        assert (spec["holderIdentity"], spec["leaseDurationSeconds"]) == ("a", 15)
        assert datetime.fromisoformat(spec["renewTime"]) == datetime.fromisoformat(spec["acquireTime"])
        acquired = spec["acquireTime"]
        renewal = Replica("a", Line(server)).elector()
        await renewal.acquire()
        assert server.stored["spec"]["acquireTime"] == acquired
        assert server.stored["spec"]["leaseTransitions"] == 1

    run(go())

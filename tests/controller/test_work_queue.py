"""The operator's work queue, in virtual time."""

import asyncio
from collections import Counter
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from virtual_time import now, run

from controller.memory import Key
from controller.operator.queue import DUE_AT_ONCE, DUE_PER_SECOND, FIRST_RETRY_SECONDS, LONGEST_RETRY_SECONDS, WorkQueue
from controller.operator.reconciler import POLLS_PER_SECOND

A, B, C = (Key("ns", name) for name in "abc")


async def taken(queue: WorkQueue, most: int = 100) -> list[Key]:
    """What can be had at once."""
    keys: list[Key] = []
    while len(queue) and len(keys) < most:
        keys.append((await queue.get())[0])
    return keys


async def arrives(queue: WorkQueue) -> float:
    """Seconds until the next key is there."""
    began = now()
    key, _ = await queue.get()
    queue.done(key)
    return round(now() - began, 6)


def test_each_key_once_in_order_of_arrival():
    async def go():
        queue = WorkQueue(now)
        for key in (B, A, B, C, A):
            queue.add(key)
        assert len(queue) == 3
        assert await taken(queue) == [B, A, C]

    run(go())


def test_namespaces_take_turns():
    """The runs of one, however many, do not keep another's waiting."""

    async def go():
        queue = WorkQueue(now)
        for key in (A, B, C, Key("other", "x"), Key("third", "y"), Key("other", "z")):
            queue.add(key)
        assert len(queue) == 6
        found = await taken(queue)
        assert [(key.namespace, key.name) for key in found] == [
            ("ns", "a"), ("other", "x"), ("third", "y"), ("ns", "b"), ("other", "z"), ("ns", "c"),
        ]  # fmt: skip

    run(go())


def test_the_wait_is_told():
    async def go():
        queue = WorkQueue(now)
        queue.add(A)
        await asyncio.sleep(3)
        queue.add(A)
        assert await queue.get() == (A, 3.0)

    run(go())


def test_a_key_that_is_worked_on_comes_up_again_afterwards():
    async def go():
        queue = WorkQueue(now)
        queue.add(A)
        await queue.get()
        queue.add(A)
        queue.add(A)
        assert len(queue) == 0, "nobody else gets it meanwhile"
        queue.done(A)
        assert await taken(queue) == [A]
        queue.done(A)
        assert len(queue) == 0

    run(go())


SOONER = {
    "one that is later changes nothing": ([5, 9], 5),
    "one that is sooner counts": ([9, 5], 5),
    "in the past is now": ([-3], 0),
}


@pytest.mark.parametrize("sentence", SOONER)
def test_a_key_for_later(sentence):
    waits, expected = SOONER[sentence]

    async def go():
        queue = WorkQueue(now)
        for seconds in waits:
            queue.add_after(A, seconds)
        assert await arrives(queue) == expected
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(queue.get(), 1000)  # and only once

    run(go())


def test_a_timer_that_rings_while_its_key_is_worked_on_is_not_lost():
    async def go():
        queue = WorkQueue(now)
        queue.add(A)
        await queue.get()
        queue.add_after(A, 1)
        await asyncio.sleep(2)
        assert len(queue) == 0
        queue.done(A)
        assert await taken(queue) == [A]

    run(go())


def test_failures_wait_longer_and_longer_and_a_success_forgets_them():
    async def go():
        queue = WorkQueue(now)
        waits = []
        for _ in range(12):
            told = queue.retry(A)
            waits.append(await arrives(queue))
            assert waits[-1] == told
        assert waits[:4] == [FIRST_RETRY_SECONDS * 2**i for i in range(4)]
        assert waits[-1] == waits[-2] == LONGEST_RETRY_SECONDS
        queue.retry(B)
        assert await arrives(queue) == FIRST_RETRY_SECONDS, "each key has its own"
        queue.forget_failures(A)
        assert queue.retry(A) == FIRST_RETRY_SECONDS

    run(go())


def test_a_server_that_asks_for_time_gets_it():
    async def go():
        queue = WorkQueue(now)
        assert queue.retry(A, at_least=30.0) == 30.0
        assert await arrives(queue) == 30.0

    run(go())


def test_very_many_failures_are_no_overflow():
    async def go():
        queue = WorkQueue(now)
        assert {queue.retry(A) for _ in range(5000)} >= {LONGEST_RETRY_SECONDS}

    run(go())


def test_a_worker_that_is_cancelled_while_it_waits_takes_nothing_with_it():
    async def go():
        queue = WorkQueue(now)
        workers = [asyncio.create_task(queue.get()) for _ in range(3)]
        await asyncio.sleep(1)
        queue.add(A)
        workers[0].cancel()
        done, _ = await asyncio.wait(workers[1:], timeout=1)
        assert [task.result()[0] for task in done] == [A]
        for worker in workers:
            worker.cancel()

    run(go())


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.sampled_from([A, B, C]), st.floats(0, 5), st.sampled_from(["now", "later"])), max_size=30))
def test_never_two_at_one_key_and_no_wish_is_forgotten(wishes: list[tuple[Key, float, str]]) -> None:
    """Three workers; after every wish, its key is looked at once more."""
    working: Counter[Key] = Counter()
    looked: dict[Key, float] = {}
    wished: dict[Key, float] = {}

    async def worker(queue: WorkQueue) -> None:
        while True:
            key, _ = await queue.get()
            working[key] += 1
            assert working[key] == 1, "two looks at one run"
            looked[key] = now()
            await asyncio.sleep(1.3)
            working[key] -= 1
            queue.done(key)

    async def go() -> None:
        queue = WorkQueue(now)
        workers = [asyncio.create_task(worker(queue)) for _ in range(3)]
        for key, seconds, when in wishes:
            if when == "now":
                queue.add(key)
                wished[key] = max(now(), wished.get(key, 0))
            else:
                # As after a look: the wish is for then, or for earlier.
                queue.add_after(key, seconds)
            await asyncio.sleep(seconds / 3)
        await settle(workers)
        assert all(looked[key] >= moment for key, moment in wished.items())
        assert set(looked) == {key for key, *_ in wishes}
        assert len(queue) == 0

    run(go())


async def settle(workers: list[asyncio.Task[Any]]) -> None:
    await asyncio.sleep(100)
    for task in workers:
        task.cancel()
    outcomes = await asyncio.gather(*workers, return_exceptions=True)
    assert all(isinstance(outcome, asyncio.CancelledError) for outcome in outcomes), outcomes


DUE = [Key("ns", f"due-{number}") for number in range(20)]


def test_what_has_happened_does_not_stand_behind_what_is_due():
    """Of these one has its place always, so that they go on under whatever comes."""

    async def go():
        queue = WorkQueue(now)
        for key in DUE:
            queue.add_due(key)
        for key in (A, B, C):
            queue.add(key)
        assert await taken(queue, 4) == [DUE[0], A, B, C]
        queue.done(DUE[0])
        queue.add(Key("ns", "d"))
        await asyncio.sleep(1 / DUE_PER_SECOND)
        assert await taken(queue, 2) == [DUE[1], Key("ns", "d")]

    run(go())


def test_looks_that_come_due_together_begin_evenly():
    """Runs that were started together; and what happens meanwhile does not wait for them."""

    async def go():
        queue, began = WorkQueue(now), now()
        for key in DUE:
            queue.add_due(key)
        for number in range(len(DUE) // 2):
            assert await arrives(queue) == (0 if number == 0 else 1 / DUE_PER_SECOND)
        queue.add(A)
        assert await queue.get() == (A, 0)
        while queue:
            await arrives(queue)
        assert round(now() - began, 6) == (len(DUE) - 1) / DUE_PER_SECOND
        await asyncio.sleep(1)
        queue.add_due(B)
        assert await arrives(queue) == 0, "one alone does not wait"

    run(go())
    assert DUE_PER_SECOND > POLLS_PER_SECOND, "or they would wait longer and longer"


def test_looks_that_are_due_leave_room_for_others():
    async def go():
        queue = WorkQueue(now)
        for key in DUE:
            queue.add_due(key)
        assert await taken(queue, DUE_AT_ONCE) == DUE[:DUE_AT_ONCE]
        waiting = asyncio.create_task(queue.get())
        await asyncio.sleep(1)
        assert not waiting.done()
        queue.done(DUE[0])
        assert (await waiting)[0] == DUE[DUE_AT_ONCE]

    run(go())


def test_one_that_is_due_and_of_which_something_is_told_is_looked_at_once():
    async def go():
        queue = WorkQueue(now)
        for key in (B, C, A):
            queue.add_due(key)
        queue.add(A)
        queue.add_due(A)
        assert len(queue) == 3
        assert await taken(queue, 3) == [B, A, C]
        queue.add_due(A)
        queue.add(A)
        queue.add_due(A)
        queue.add_due(B)
        queue.done(B)
        queue.done(A)
        assert await taken(queue, 2) == [A, B], "what was told while it was worked on is news afterwards"

    run(go())


def test_what_has_failed_is_tried_again_as_news():
    async def go():
        queue = WorkQueue(now)
        queue.add_after(A, 30)
        queue.retry(A)
        await asyncio.sleep(1)
        for key in DUE:
            queue.add_due(key)
        assert await taken(queue, 2) == [DUE[0], A]

    run(go())

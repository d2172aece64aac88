"""How often the queues of runs that only wait are asked for their words."""

import heapq
from datetime import timedelta
from itertools import pairwise

from builders import after, job, make_run, seen, sft
from desk import Desk

from controller.api.status import QueueState, QueueStatus
from controller.memory import Key
from controller.operator.in_line import WORDS_PER_SECOND, InLine
from controller.operator.reconciler import POLL

CROWD = [Key("ns", f"run-{number}") for number in range(1000)]
HOUR = 3600.0


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def asked(line: InLine, clock: Clock, keys: list[Key], until: float, waited: bool) -> list[tuple[float, Key]]:
    """As by a reconciler that looks at a run when it was told to, and first of all at all of them."""
    found, due, known = [], [(clock.now, key) for key in keys], set(keys if waited else ())
    while due and due[0][0] < until:
        at, key = heapq.heappop(due)
        clock.now = max(clock.now, at)
        if asks := line.asks(key, key in known):
            found.append((clock.now, key))
        known.add(key)
        heapq.heappush(due, (clock.now + line.again(key, asks).total_seconds(), key))
    return found


def times(found: list[tuple[float, Key]], key: Key) -> list[float]:
    return [at for at, other in found if other == key]


def test_one_alone_asks_as_often_as_others_are_looked_at():
    clock = Clock()
    found = times(asked(InLine(POLL, clock), clock, CROWD[:1], 100, waited=False), CROWD[0])
    assert found == [0, 15, 30, 45, 60, 75, 90]


def test_a_crowd_asks_in_turn_and_who_is_new_asks_early():
    clock = Clock()
    line = InLine(POLL, clock)
    asked(line, clock, CROWD, HOUR, waited=False)
    began = clock.now
    line.asks(new := Key("ns", "new"), waited=False)
    line.again(new, asked=True)
    found = asked(line, clock, [*CROWD, new], 2 * HOUR, waited=True)
    later = [at for at, _ in found if at > 1.5 * HOUR]
    assert 0.9 * WORDS_PER_SECOND < len(later) / (0.5 * HOUR) <= 1.01 * WORDS_PER_SECOND
    assert [at - began for at in times(found, new)][:3] == [15, 60, 240]
    assert all(len(times(found, key)) >= 3 for key in CROWD), "each has its turn"


def test_a_new_process_does_not_ask_for_what_has_been_said():
    clock = Clock()
    line = InLine(POLL, clock)
    found = asked(line, clock, CROWD, HOUR, waited=True)
    first = sorted(times(found, key)[0] for key in CROWD)
    assert first[0] == POLL.total_seconds()
    assert {round(later - sooner, 6) for sooner, later in pairwise(first)} == {1 / WORDS_PER_SECOND}
    assert len(found) / HOUR <= 1.01 * WORDS_PER_SECOND


def test_one_that_was_let_go_and_waits_again_is_new():
    clock = Clock()
    line = InLine(POLL, clock)
    asked(line, clock, CROWD, HOUR, waited=True)
    line.forget(CROWD[0])
    assert line.asks(CROWD[0], waited=False)
    assert line.again(CROWD[0], asked=True) == POLL


def test_what_waits_is_looked_at_without_asking_until_its_turn_and_what_runs_is_asked_about():
    """A look of another cause finds that nothing has been said since."""
    desk = Desk(queueName="gpus")
    run = make_run(sft("base"), queueName="gpus")
    desk.look()
    waits = seen(job(run, "base", queue_name="gpus", queue=QueueStatus(state=QueueState.PENDING, message="no quota")))
    assert desk.look(waits, at=1) == POLL
    assert desk.status.phase == "Queued"
    words = desk.backend.words
    assert timedelta() < (desk.look(waits, at=2) or POLL) <= POLL
    assert desk.backend.words == words
    admitted = QueueStatus(state=QueueState.ADMITTED)
    desk.look(seen(job(run, "base", queue_name="gpus", queue=admitted, running_since=after(3))), at=3)
    desk.look(at=4)
    assert desk.backend.words == words + 1, "the look that finds it let go was made without, the next ones are not"

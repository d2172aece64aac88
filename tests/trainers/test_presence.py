"""Processes that tell each other that they are there: with a store, and threads in the place of processes."""

import threading

import pytest
from torch.distributed import TCPStore

from trainers.core import presence
from trainers.core.presence import Presence

EVERY, MISSED = 0.1, 15
LONG = 60
"""Seconds on a busy machine."""


@pytest.fixture
def group(monkeypatch):
    """``group(ranks)``: those of three processes that are there; ``gave_up`` says what they have said at their ends."""
    server = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(server.port))
    monkeypatch.setattr(presence, "EVERY_SECONDS", EVERY)
    monkeypatch.setattr(presence, "MISSED", MISSED)
    found = []

    def make(ranks):
        monkeypatch.setattr(presence, "_groups", iter([0] * len(ranks)))
        found.extend(Presence(rank, 3, Said()) for rank in ranks)
        return found

    yield make
    for process in found:
        process.close()


class Said:
    def __init__(self):
        self.text, self.event = "", threading.Event()

    def __call__(self, text):
        self.text = text
        self.event.set()


def test_one_that_never_appears_is_named_by_the_one_before_it(group):
    first, second = group([0, 1])
    assert second.give_up.event.wait(LONG)
    assert second.give_up.text.startswith("rank 2 has given no sign of life for 2 s")
    assert not first.give_up.event.is_set(), "rank 1 is there"


def test_nobody_is_missed_while_all_count_and_after_they_are_done(group):
    processes = group([0, 1, 2])
    assert not processes[0].give_up.event.wait(2 * EVERY * MISSED)
    processes[1].close()
    assert not any(process.give_up.event.wait(2 * EVERY * MISSED) for process in processes)


def test_one_that_stops_counting_without_a_word_is_missed(group):
    processes = group([0, 1, 2])
    processes[1].closed.set()  # as if frozen: it says nothing of being done
    assert processes[0].give_up.event.wait(LONG)
    assert "rank 1" in processes[0].give_up.text


def test_a_store_that_does_not_answer_is_told_from_a_process_that_is_gone(group, monkeypatch):
    (process,) = group([0])
    monkeypatch.setattr(process, "store", Unreachable())
    assert process.give_up.event.wait(LONG)
    assert "the store" in process.give_up.text


class Unreachable:
    def set(self, *_):
        raise RuntimeError("connection reset")

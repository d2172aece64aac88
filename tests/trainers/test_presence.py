"""Processes that tell each other that they are there: with a store, and threads in the place of processes."""

import subprocess
import sys
import threading
import time

import pytest
from torch.distributed import TCPStore

from trainers.contract import Infrastructure
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
        self.text, self.is_cause, self.event = "", False, threading.Event()

    def __call__(self, text, is_cause):
        self.text, self.is_cause = text, is_cause
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
    processes[1].store = silent = Silent()  # as if frozen: it says nothing of being done
    assert processes[0].give_up.event.wait(LONG)
    assert "rank 1" in processes[0].give_up.text
    assert processes[0].give_up.is_cause
    silent.event.set()


def test_a_store_that_does_not_answer_is_told_from_a_process_that_is_gone(group, monkeypatch):
    (process,) = group([0])
    monkeypatch.setattr(process, "store", Silent())
    assert process.give_up.event.wait(LONG)
    assert process.give_up.text.startswith("the store through which processes have met has not answered for 2 s")
    process.store.event.set()


class Silent:
    """Whatever a store is asked."""

    def __init__(self):
        self.event = threading.Event()

    def __getattr__(self, _: str):
        return self._answer

    def _answer(self, *_):
        self.event.wait()
        raise RuntimeError("at last")


def test_a_store_that_is_gone_ends_everybody_soon(monkeypatch):
    """As when the process that holds it is killed."""
    script = (
        "from torch.distributed import TCPStore; s = TCPStore('127.0.0.1', 0, is_master=True, wait_for_workers=False)"
    )
    command = [sys.executable, "-c", f"{script}; print(s.port, flush=True); input()"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:
        monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
        monkeypatch.setenv("MASTER_PORT", server.stdout.readline().strip())
        monkeypatch.setattr(presence, "EVERY_SECONDS", EVERY)
        monkeypatch.setattr(presence, "MISSED", 10**6)
        monkeypatch.setattr(presence, "_groups", iter([0, 0]))
        processes = [Presence(rank, 2, Said()) for rank in range(2)]
        assert not processes[0].give_up.event.wait(10 * EVERY)
        server.kill()
        assert all(process.give_up.event.wait(LONG) for process in processes)
    assert "the process that held it" in processes[1].give_up.text


def test_everybody_is_told_of_one_that_fails(group, monkeypatch):
    """Also those that look at another one."""
    monkeypatch.setattr(presence, "MISSED", 10**6)
    processes = group([0, 1, 2])
    processes[1].fail()
    for other in (processes[0], processes[2]):
        assert other.give_up.event.wait(LONG)
        assert other.give_up.text == "rank 1 has failed"
        assert not other.give_up.is_cause
    assert not processes[1].give_up.event.is_set(), "it has said why itself"


def test_one_that_fails_by_itself_meanwhile_says_so_itself(group, monkeypatch):
    monkeypatch.setattr(presence, "MISSED", 10**6)
    monkeypatch.setattr(presence, "GRACE", 10**6)
    processes = group([0, 1, 2])
    processes[1].fail()
    wait_until(lambda: processes[0].trouble)
    processes[0].fail()
    monkeypatch.setattr(presence, "GRACE", 0)
    assert not processes[0].give_up.event.wait(10 * EVERY)


def wait_until(true):
    until = time.monotonic() + LONG
    while not true():
        assert time.monotonic() < until
        time.sleep(EVERY / 10)


def launched(port: int) -> dict[str, str]:
    return {"TORCHELASTIC_USE_AGENT_STORE": "True", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}


def test_processes_whose_launcher_died_before_they_met_end_soon(monkeypatch):
    """They tried to reach its store for six hours."""
    monkeypatch.setattr(presence, "MEETING_SECONDS", 0.3)
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    presence.find_store(launched(store.port))
    port = store.port
    del store
    with pytest.raises(Infrastructure, match=f"torchrun is gone: nobody answers at 127.0.0.1:{port}"):
        presence.find_store(launched(port))


def test_whose_store_one_of_them_holds_is_waited_for(monkeypatch):
    monkeypatch.setattr(presence, "MEETING_SECONDS", 0.0)
    presence.find_store({"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"})

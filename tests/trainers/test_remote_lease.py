"""Two writers want one folder of an object store: the store itself tells the later one's word from the earlier one's."""

import threading

import pytest
import remote_store
from remote_store import sft, start, steps, wait_for, weights

from trainers import lease
from trainers.contract import ATTEMPT_VARIABLE, RUN_UID_VARIABLE, Infrastructure
from trainers.lease import Held, Superseded, this_process
from trainers.phase_dir import PhaseDir
from trainers.remote.lease import StoreLease
from trainers.remote.store import Store

server, bucket, in_pod = remote_store.server, remote_store.bucket, remote_store.in_pod

NAME = "run/.writers/sft.json"


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(lease, "COUNT_SECONDS", 0.2)
    monkeypatch.setattr(lease, "SILENT_SECONDS", 2.0)
    monkeypatch.setattr(lease, "LOOK_SECONDS", 0.05)


@pytest.fixture(params=["s3", "plain"])
def place(request, tmp_path):
    """Of a store with conditional writes, and of one without."""
    if request.param == "plain":
        return f"memory://{tmp_path.name}"
    return request.getfixturevalue("bucket").uri


@pytest.fixture
def took(place):
    """``took(uid, attempt)``: a lease that has been taken, on a machine of which nothing can be known from here."""
    taken = []

    def take(uid, attempt, **kwargs):
        owner = this_process("helpful").model_copy(update={"uid": uid, "attempt": attempt, "machine": "another"})
        taken.append(StoreLease(Store(place), NAME, owner, **kwargs))
        taken[-1].acquire()
        return taken[-1]

    yield take
    for one in taken:
        one._left.set()


def test_whoever_was_outranked_changes_nothing_any_more(took, place, tmp_path):
    told = threading.Event()
    old = took("u", 1)
    old.when_lost = told.set
    old.store.write("run/sft/a", b"old")
    new = took("u", 2)
    new.store.write("run/sft/b", b"new")
    (tmp_path / "f").write_text("old")
    assert told.wait(30)
    for change in (
        lambda: old.store.write("run/sft/b", b"old"),
        lambda: old.store.upload({"run/sft/b": tmp_path / "f"}),
        lambda: old.store.copy({"run/sft/a": "run/sft/b"}),
        lambda: old.store.delete(["run/sft/b"]),
        lambda: old.store.create("run/sft/c", b"old"),
        lambda: old.__exit__(None, None, None) or old.check(),
    ):
        with pytest.raises(Superseded, match=r"run helpful attempt 2 \(uid u\)"):
            change()
    assert (new.store.read("run/sft/b"), new.store.read("run/sft/c")) == (b"new", None)
    new.check()


def test_another_run_waits_until_it_is_let_in(took):
    old = took("first", 3)
    with pytest.raises(Held, match=r"attempt 3 \(uid first\)"):
        took("second", 1, patience=0)
    old.__exit__(None, None, None)
    assert took("second", 1, patience=0).number == 2


def test_one_that_says_nothing_any_more_is_followed_after_a_while(took):
    old = took("first", 3)
    old._left.set()
    took("second", 1).check()
    with pytest.raises(Superseded):
        old.check()


def test_what_says_that_work_is_whole_replaces_nothing(place):
    """However late it comes: the look at the lease was before."""
    store = Store(place)
    store.create("run/sft/result.json", b"first")
    with pytest.raises(Infrastructure, match="somebody else has written it"):
        store.create("run/sft/result.json", b"second")
    assert store.read("run/sft/result.json") == b"first"
    store.create("run/sft/result.json", b"first")  # asked again, because the answer was lost


def test_of_many_that_want_it_at_once_one_has_it(bucket):
    """The store decides, not the order in which they have looked."""
    stores = [Store(bucket.uri) for _ in range(8)]
    had = [None] * 8

    def take(i):
        had[i] = stores[i].swap(NAME, b"%d" % i, None)

    threads = [threading.Thread(target=take, args=[i]) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (winner,) = [i for i in range(8) if had[i]]
    assert stores[0].read(NAME) == b"%d" % winner


def test_a_cut_off_node_that_trains_on_ends_and_the_next_attempt_leaves_what_it_would_alone(
    in_pod, bucket, tiny_model_dir, tmp_path, monkeypatch
):
    """It reaches the store all the time. Another seed, so that what either has written can be told apart."""
    for name, value in ((RUN_UID_VARIABLE, "u"), (ATTEMPT_VARIABLE, "1")):
        monkeypatch.setenv(name, value)
    slow = """
import time
from trainers import lease, meter
lease.COUNT_SECONDS = 0.2
log = meter.Meter.log
meter.Meter.log = lambda *args, **values: (time.sleep(0.3), log(*args, **values))
"""
    long = {"duration": {"maxSteps": 2000}}
    node = start(tmp_path / "node", sft(tiny_model_dir, **long), f"{bucket.uri}/ws", slow, phase="sft", run="run")
    wait_for(lambda: "sft/checkpoints/step-2/.manifest.json" in bucket.names("ws/run"), node, 600)
    monkeypatch.setenv(ATTEMPT_VARIABLE, "2")
    code, result, output = in_pod("sft", sft(tiny_model_dir, seed=2))
    assert code == 0
    assert node.wait(600) == 143
    assert "superseded: run local attempt 2 (uid u)" in node.stdout.read().decode()
    assert weights(output) == weights(bucket.path / "ws/run/sft")
    assert PhaseDir(bucket.path / "ws/run/sft").read_result() == result
    assert steps(output) == steps(bucket.path / "ws/run/sft")
    assert steps(output)[-1] == 6

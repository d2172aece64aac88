"""Two writers want one folder: one writes, and the other one is kept from it, whenever it was stopped."""

import json
import os
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path

import pytest
from kill_points import frozen, killed, operations
from remote_store import sft, wait_for, weights

from trainers import files, lease
from trainers.contract import ATTEMPT_VARIABLE, RUN_UID_VARIABLE, FailureClass, Identity, Interrupted
from trainers.failures import classify
from trainers.lease import FolderLease, Held, Owner, Superseded, this_process
from trainers.phase_dir import PhaseDir, open_directory

FIRST = int(os.environ.get("SEED", "0")) % 3
"""Of the operations at which processes are stopped: ``SEED`` chooses others."""


TAKEN: list[FolderLease] = []


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(lease, "COUNT_SECONDS", 0.05)
    monkeypatch.setattr(lease, "SILENT_SECONDS", 0.5)
    monkeypatch.setattr(lease, "LOOK_SECONDS", 0.01)
    yield
    while TAKEN:
        TAKEN.pop()._left.set()
    files.drafts.clear()


def owner(uid: str = "", attempt: int = 0, **changes) -> Owner:
    return this_process("helpful").model_copy(update={"uid": uid, "attempt": attempt, **changes})


def elsewhere(uid: str = "", attempt: int = 0) -> Owner:
    """On a machine of which nothing can be known from here."""
    return owner(uid, attempt, machine="another", host="node-7")


def took(root: Path, who: Owner, **kwargs) -> FolderLease:
    found = FolderLease(root, who, **kwargs)
    found.acquire()
    TAKEN.append(found)
    return found


def silent(root: Path, who: Owner) -> FolderLease:
    """One that says nothing more, as after a loss of power."""
    found = took(root, who)
    found._left.set()
    return found


def write_all(root: Path, content: str) -> None:
    """Everything that is done to a phase's folder."""
    files.write_atomic(root / "progress", content)
    with files.new_directory(root / "model") as made:
        (made / "weights").write_text(content)
    for step in (1, 2):
        temporary = files.draft_directory(root / "checkpoints" / f"step-{step}")
        files.empty_directory(temporary)
        (temporary / "shard").write_text(content)
        files.commit_directory(temporary, root / "checkpoints" / f"step-{step}")
    files.discard(root / "checkpoints" / "step-1")
    with files.begin_file(root / "metrics", content) as lines:
        lines.write(content)
    files.write_atomic(root / "result", content)


def all_of(root: Path) -> dict[str, str]:
    return {path.relative_to(root).as_posix(): path.read_text() for path in root.rglob("*") if path.is_file()}


class TestWho:
    def test_one_after_another_has_a_higher_number(self, tmp_path):
        for number in (1, 2, 3):
            with FolderLease(tmp_path / "sft", owner()) as held:
                assert held.number == number
                assert files.drafts
        assert not files.drafts
        assert len(list((tmp_path / ".writers/sft").iterdir())) == 1

    def test_a_newer_attempt_takes_over_at_once_and_the_older_one_is_told(self, tmp_path):
        told = []
        first = took(tmp_path / "sft", elsewhere("u", 1))
        first.when_lost = lambda: told.append(1)
        began = time.monotonic()
        with FolderLease(tmp_path / "sft", elsewhere("u", 2)):
            assert time.monotonic() - began < 0.3
            with pytest.raises(
                Superseded, match=r"run helpful attempt 2 \(uid u\), process \d+ on node-7 has taken over"
            ):
                first.check()
            while not told:
                time.sleep(0.01)

    def test_an_older_attempt_that_comes_late_ends(self, tmp_path):
        """Even if the newer one has ended: what it has left may be of another spec."""
        with FolderLease(tmp_path / "sft", elsewhere("u", 2)) as newer:
            with pytest.raises(Superseded):
                took(tmp_path / "sft", elsewhere("u", 1))
            newer.check()
        with pytest.raises(Superseded):
            took(tmp_path / "sft", elsewhere("u", 1))

    def test_an_attempt_begun_again_is_the_same_attempt(self, tmp_path):
        """A pod of a job that somebody deleted; or one after a restored snapshot of etcd, from which attempts are counted."""
        with FolderLease(tmp_path / "sft", elsewhere("u", 2)), pytest.raises(Held):
            took(tmp_path / "sft", elsewhere("u", 2), patience=0)
        took(tmp_path / "sft", elsewhere("u", 2)).check()

    def test_another_run_waits_and_says_for_whom(self, tmp_path, capsys):
        with FolderLease(tmp_path / "sft", elsewhere("old", 7)) as old:
            with pytest.raises(Held, match=r"run helpful attempt 7 \(uid old\).* on node-7 is writing"):
                took(tmp_path / "sft", elsewhere("new", 1), patience=1.0)
            old.check()
        assert "waiting for run helpful attempt 7 (uid old)" in capsys.readouterr().err
        took(tmp_path / "sft", elsewhere("new", 1)).check()

    def test_one_that_says_nothing_any_more_is_waited_for_by_the_own_clock(self, tmp_path):
        gone = silent(tmp_path / "sft", elsewhere("old", 1))
        began = time.monotonic()
        took(tmp_path / "sft", elsewhere("new", 1))
        assert time.monotonic() - began >= lease.SILENT_SECONDS
        with pytest.raises(Superseded):
            gone.check()

    def test_a_process_of_this_machine_that_has_ended_is_not_waited_for(self, tmp_path):
        ended = subprocess.Popen(["sleep", "60"])
        began = lease._began(ended.pid)
        dead = silent(tmp_path / "sft", owner(pid=ended.pid, began=began))
        assert not dead.owner.has_ended
        with pytest.raises(Held):
            took(tmp_path / "sft", owner(), patience=0)
        ended.kill()
        while lease._began(ended.pid):  # a zombie counts as gone
            time.sleep(0.01)
        took(tmp_path / "sft", owner(), patience=0)
        ended.wait()

    def test_a_record_that_cannot_be_read_is_waited_for(self, tmp_path):
        broken = silent(tmp_path / "sft", elsewhere("old", 1))
        (broken.own / "owner.json").write_text("{")
        with pytest.raises(Held, match="run unknown"):
            took(tmp_path / "sft", elsewhere("new", 1), patience=0)
        took(tmp_path / "sft", elsewhere("new", 1))

    def test_a_newer_version_may_say_more_of_itself(self, tmp_path):
        newer = silent(tmp_path / "sft", elsewhere("old", 1))
        record = json.loads((newer.own / "owner.json").read_text())
        (newer.own / "owner.json").write_text(json.dumps(record | {"mood": "good"}))
        with pytest.raises(Held, match=r"uid old"):
            took(tmp_path / "sft", elsewhere("new", 1), patience=0)

    def test_it_is_an_interruption_which_says_by_whom(self, tmp_path):
        """The budget of interruptions is for what has nothing to do with the run; no node is blamed."""
        older, newer = (FolderLease(tmp_path / "sft", elsewhere("u", attempt)) for attempt in (1, 2))
        with pytest.raises(Superseded) as found, older, newer:
            files.drafts[tmp_path / "sft"] = older.own
            files.write_atomic(tmp_path / "sft" / "f", "late")
        assert classify(found.value) == FailureClass.INTERRUPTED
        assert isinstance(found.value.__cause__, FileNotFoundError)
        assert not (tmp_path / "sft").exists()

    def test_what_fails_while_the_lease_is_held_fails_as_it_did(self, tmp_path):
        with pytest.raises(KeyError), FolderLease(tmp_path / "sft", owner()):
            raise KeyError("loss")
        with pytest.raises(Interrupted, match="saved"), FolderLease(tmp_path / "sft", owner()):
            raise Interrupted("saved")


class TestFrozen:
    """The cut-off node that comes back: a real process is stopped at each thing that it does to files, and goes on."""

    @pytest.fixture
    def work(self):
        def do(folder: Path) -> None:
            with FolderLease(folder / "run/sft", owner("u", 1)):
                files.write_atomic(folder / "run/sft/progress", "before")
            with FolderLease(folder / "run/sft", owner("u", 1)):
                open_directory(PhaseDir(folder / "run/sft"), Identity(digest="d"))
                write_all(folder / "run/sft", "old")

        return do

    def test_nothing_of_it_is_seen_whenever_it_was_stopped(self, work, tmp_path):
        count = len(operations(work, tmp_path / "counted"))
        assert count > 60
        ended = set()
        for at in range(FIRST, count, 3):
            root = tmp_path / f"frozen-{at}" / "run/sft"
            seen = {}

            def take_over(root=root, seen=seen):
                took(root, owner("u", 2))
                open_directory(PhaseDir(root), Identity(digest="d"))
                write_all(root, "new")
                seen.update(all_of(root))

            status = frozen(work, root.parents[1], at, take_over)
            ended.add(os.waitstatus_to_exitcode(status))
            with TAKEN.pop() as newer:
                newer.check()
            assert all_of(root) == seen, at
            assert {seen[name] for name in ("progress", "model/weights", "result")} == {"new"}
            assert set(seen) >= {"checkpoints/step-2/shard", "metrics"}
            assert "checkpoints/step-1/shard" not in seen
        assert ended <= {0, 1}

    def test_killed_at_any_operation_it_leaves_nothing_that_stays(self, work, tmp_path):
        count = len(operations(work, tmp_path / "counted"))
        for at in range(FIRST, count, 5):
            folder = tmp_path / f"killed-{at}"
            killed(work, folder, at)
            work(folder)
            assert [path.name for path in (folder / "run").iterdir() if path.name != ".writers"] == ["sft"]
            (left,) = (folder / "run/.writers/sft").iterdir()
            assert {path.name for path in left.iterdir()} == {"owner.json", "count", "released"}

    def test_many_that_want_it_at_once_have_it_one_after_another(self, tmp_path, monkeypatch):
        """Each adds to a number that it has read: none of them reads what another one is about to replace."""
        monkeypatch.setattr(lease, "SILENT_SECONDS", 60)
        root = tmp_path / "run/sft"
        root.mkdir(parents=True)
        (root / "number").write_text("0")
        children = [_forked(root) for _ in range(6)]
        assert [os.waitpid(child, 0)[1] for child in children] == [0] * 6
        assert (root / "number").read_text() == "60"


def _forked(root: Path) -> int:
    child = os.fork()
    if child == 0:
        try:
            for _ in range(10):
                with FolderLease(root, owner()):
                    files.write_atomic(root / "number", str(int((root / "number").read_text()) + 1))
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    return child


# ---------------------------------------------------------------- a phase

SLOW = """
import time
from trainers import meter
log = meter.Meter.log
meter.Meter.log = lambda *args, **values: (time.sleep(0.2), log(*args, **values))
"""


def started(folder: Path, file: Path, attempt: int, uid: str = "u", prelude: str = "") -> subprocess.Popen:
    code = f"""{prelude}
from trainers import lease
lease.COUNT_SECONDS, lease.SILENT_SECONDS, lease.LOOK_SECONDS = 0.2, 2.0, 0.05
import runpy, sys
sys.argv = ["trainers", "sft", "--spec", {str(file)!r}]
runpy.run_module("trainers", run_name="__main__")
"""
    about = {
        RUN_UID_VARIABLE: uid,
        ATTEMPT_VARIABLE: str(attempt),
        "ALIGNMENT_TERMINATION_LOG": str(folder / f"{uid}{attempt}"),
    }
    environment = {**os.environ, **about, "OMP_NUM_THREADS": "1", "ALIGNMENT_METRICS_PORT": "0"}
    return subprocess.Popen(
        [sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


def test_a_frozen_attempt_that_goes_on_after_the_next_one_began_changes_nothing(tiny_model_dir, tmp_path):
    output = tmp_path / "ws/run/sft"
    for name, seed in (("old", 1), ("new", 2)):
        document = {"output": str(output), "spec": sft(tiny_model_dir, seed=seed, duration={"maxSteps": 20})}
        (tmp_path / f"{name}.yaml").write_text(json.dumps(document))
    old = started(tmp_path, tmp_path / "old.yaml", 1, prelude=SLOW)
    wait_for((output / "checkpoints/step-2").exists, old, 600)
    old.send_signal(signal.SIGSTOP)
    new = started(tmp_path, tmp_path / "new.yaml", 2)
    assert new.wait(600) == 0, new.stdout.read().decode()
    made = {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in output.rglob("*") if path.is_file()}
    result = weights(output)
    old.send_signal(signal.SIGCONT)
    assert old.wait(600) == 143, old.stdout.read().decode()
    said = json.loads((tmp_path / "u1").read_text())
    assert said["failure"] == "Interrupted"
    assert "superseded: run local attempt 2 (uid u)" in said["message"]
    assert weights(output) == result
    after = {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in output.rglob("*") if path.is_file()}
    assert after == made


@pytest.mark.distributed
def test_a_run_made_again_waits_for_the_pod_that_still_saves(tiny_model_dir, tmp_path):
    """Its work is another's by then, and goes to the history whole."""
    output = tmp_path / "ws/run/sft"
    for name, seed in (("old", 1), ("new", 2)):
        document = {"output": str(output), "spec": sft(tiny_model_dir, seed=seed, duration={"maxSteps": 4})}
        (tmp_path / f"{name}.yaml").write_text(json.dumps(document))
    old = started(tmp_path, tmp_path / "old.yaml", 3, uid="first", prelude=SLOW)
    wait_for((output / "checkpoints/step-1").exists, old, 600)
    new = started(tmp_path, tmp_path / "new.yaml", 1, uid="second")
    assert old.wait(600) == 0, old.stdout.read().decode()
    assert new.wait(600) == 0
    assert "waiting for run local attempt 3 (uid first)" in new.stdout.read().decode()
    assert PhaseDir(output).read_result().seed == 2
    (kept,) = (output.parent / ".history").iterdir()
    assert PhaseDir(kept).read_result().seed == 1


@pytest.mark.distributed
def test_a_pod_made_anew_as_the_same_attempt_waits_for_the_process_of_the_one_before(tiny_model_dir, tmp_path):
    """A pod that is deleted by force is made anew by the Training Operator while its process may still save on its node."""
    output = tmp_path / "ws/run/sft"
    document = {"output": str(output), "spec": sft(tiny_model_dir, duration={"maxSteps": 200})}
    (tmp_path / "phase.yaml").write_text(json.dumps(document))
    old = started(tmp_path, tmp_path / "phase.yaml", 1, prelude=SLOW)
    wait_for((output / "checkpoints/step-2").exists, old, 600)
    new = started(tmp_path, tmp_path / "phase.yaml", 1)
    said = next(line for line in map(bytes.decode, new.stdout) if "waiting for" in line)
    assert "waiting for run local attempt 1 (uid u)" in said
    old.terminate()
    assert old.wait(600) == 143, old.stdout.read().decode()
    stopped = json.loads((tmp_path / "u1").read_text())
    assert "superseded" not in stopped["message"], "it has saved as if nobody waited"
    rest = new.stdout.read().decode()
    assert new.wait(600) == 0, rest
    steps = [json.loads(line)["step"] for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert steps == sorted(set(steps)) and steps[0] < 10, "of both, each step once"

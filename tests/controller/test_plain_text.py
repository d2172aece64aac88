"""Texts of strangers on their way to a status, an event, a log, a label, a terminal."""

import json
import os
import re
import sys
from typing import Any

import pytest
from builders import START, after, job, make_run, seen, sft
from hypothesis import given
from hypothesis import strategies as st
from pods import job as pytorch_job
from pods import pod, said, terminated

from controller.api.status import Attempt, PhaseStatus, RunStatus
from controller.api.text import LIMIT, for_terminal, plain
from controller.backends.cluster import evidence, observe
from controller.commands.cluster.pods import Pod
from controller.commands.logs import print_line
from controller.commands.say import say
from controller.kube.answers import ApiError
from controller.kube.calls import Call
from controller.kube.resources import RUNS
from controller.memory import Key
from controller.operator.events import NOTE_LIMIT, Event, render
from controller.operator.meter import OperatorMetrics
from controller.plan.decide import decide
from controller.plan.observed import JobState
from trainers.contract import FailureClass

NASTY = "\x1b]0;owned\x07\x1b[2J\x1b[31mred\x1b[0m \u202eback\u202c\r\nline two\x00\x9b1m\x08 end"
TAME = "red back line two end"
UNSEEN = re.compile(r"[\x00-\x1f\x7f-\x9f\u202a-\u202e\ud800-\udfff]")


def test_what_a_terminal_would_obey_is_gone():
    assert plain(NASTY) == TAME
    assert for_terminal("\tcol\x1b[31mour\x1b[0m\x1b]52;c;ZXZpbA==\x07\r\n") == "\tcolour\n"


@pytest.mark.parametrize("text", ["", "out of memory:  2 GiB", "нет памяти", "内存不足 😀", "a" * LIMIT])
def test_what_people_write_stays(text: str):
    assert plain(text) == text


@given(st.text(), st.integers(1, 50))
def test_plain_is_text_on_one_line_and_the_same_again(text: str, limit: int):
    found = plain(text, limit)
    assert not UNSEEN.search(found)
    assert len(found) <= limit
    assert plain(found, limit) == found


def test_a_long_text_is_cut_before_it_costs_anything():
    assert plain("\x1b[" * 10**6) == ""
    assert plain("x" * 10**6) == "x" * LIMIT


# ---------------------------------------------------------------- everywhere it may come out


def failed(word: str, **more: Any) -> Any:
    """The attempt that a pod with this last word makes."""
    run = make_run(sft("base"))
    found = evidence.find([pod(phase="Failed", terminated=terminated(1, word), **more)])
    assert found is not None
    ended = job(run, "base", 1, JobState.FAILED, failure=found.failure, message=found.message, finished_at=START)
    return decide(run.model_copy(update={"status": decide(run, seen(), START).status}), seen(ended), after(1))


WORDS = {
    "its word": failed(said("Internal", NASTY)),
    "its log": failed(NASTY.replace("\r\n", " ")),
    "the node's word": failed("", reason="Evicted", message=NASTY),
}


@pytest.mark.parametrize("decision", WORDS.values(), ids=WORDS)
def test_a_pods_last_word_comes_plain_into_status_and_events(decision):
    document = json.dumps(decision.status.document(), ensure_ascii=False)
    assert not UNSEEN.search(document)
    assert "back line two end" in document
    (phase,) = decision.status.phases
    for note in (phase.message, phase.attempts[-1].message):
        assert "owned" not in note


def test_an_event_is_plain_and_short():
    run = make_run(sft("base"))
    assert render(Event("RunAccepted", NASTY), run, "me", START)["note"] == TAME
    assert len(render(Event("RunAccepted", "я" * 5000), run, "me", START)["note"].encode()) <= NOTE_LIMIT


def test_a_status_that_somebody_else_wrote_is_read_plain():
    """An earlier operator did not look; `alignctl status` shows what it reads."""
    written = {"phases": [{"name": "p", "type": "sft", "message": NASTY, "attempts": [
        {"number": 1, "digest": "d", "state": "Failed", "message": NASTY, "node": NASTY}]}]}  # fmt: skip
    status = RunStatus.model_validate(written)
    assert (status.phases[0].message, status.phases[0].attempts[0].node) == (TAME, TAME)


def test_a_pod_that_waits_says_so_plainly():
    waiting = pod(waiting={"reason": "ErrImagePull", "message": NASTY})
    assert Pod(waiting).holdup.endswith(TAME)


def test_a_log_on_a_terminal_is_no_more_than_text(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """By a program it is read as it is."""
    print_line(NASTY)
    assert capsys.readouterr().out == NASTY
    ours, theirs = os.openpty()
    with os.fdopen(theirs, "w") as terminal, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", terminal)
        print_line(f"a\tlog {NASTY}\n")
    shown = os.read(ours, 4096)
    os.close(ours)
    assert shown == b"a\tlog red back\r\nline two end\r\n"


def test_what_the_api_server_passes_on_is_plain():
    """A webhook's word, for logs."""
    assert str(ApiError(Call("create", RUNS), "x", 400, NASTY)) == f"create alignmentruns x: 400 {TAME}"


# ---------------------------------------------------------------- results


def result(**more: Any):
    word = said(None, digest="d", artifactDigest=more.pop("artifact", "a" * 64), metrics=more)
    return observe.result_of([pod(phase="Succeeded", terminated=terminated(0, word, "Completed"))])


def test_figures_have_plain_names_and_are_so_many():
    found = result(**{NASTY: 1.0, "x" * 5000: 2.0, **{f"m{i}": float(i) for i in range(5000)}})
    assert found is not None
    assert len(found.metrics) == observe.MOST_METRICS
    assert list(found.metrics)[:2] == [TAME, "x" * observe.NAME_LIMIT]


@pytest.mark.parametrize("artifact", ["", "a b", "\x1b[2J", "a" * 129, "a\n"])
def test_a_result_is_named_by_a_digest(artifact: str):
    assert result(artifact=artifact) is None


@pytest.mark.parametrize("metrics", ["1e999", "9" * 4000, '"\\ud800"', "[" * 4000])
def test_no_last_word_is_too_much(metrics: str):
    ended = pod(phase="Failed", terminated=terminated(1, f'{{"metrics": {{"a": {metrics}}}}}'))
    assert observe.observed_job(pytorch_job("Failed"), [ended], None, START).failure == FailureClass.INTERNAL


# ---------------------------------------------------------------- the operator's own series


def counted(*found: tuple[Key, int, int]) -> dict[str, int]:
    """How many results are shown of each run: (run, its age in seconds, how many figures it has)."""
    metrics, run = OperatorMetrics(), make_run(sft("base"))
    for key, age, count in found:
        figures = {f"m{i}": float(i) for i in range(count)}
        state = RunStatus(started_at=after(-age), phases=(PhaseStatus(name="p", type="sft", metrics=figures),))
        metrics.run_seen(key, run, state)
    shown = [
        line for line in metrics.page().decode().splitlines() if line.startswith("alignment_operator_phase_result{")
    ]
    return {key.name: sum(f'run="{key.name}"' in line for line in shown) for key, _, _ in found}


def test_one_run_does_not_take_the_others_room():
    shown = counted((Key("bad", "huge"), 0, 30_000), (Key("good", "small"), 9, 200))
    assert shown == {"huge": 0, "small": 200}


def test_one_namespace_does_not_take_the_others_room():
    flood = [(Key("bad", f"r{i}"), i, 4000) for i in range(10)]
    shown = counted(*flood, (Key("good", "old"), 9999, 200), (Key("good", "older"), 99999, 200))
    assert (shown["old"], shown["older"]) == (200, 200)
    assert sum(shown.values()) <= 20_000


def test_no_word_of_a_pod_is_a_label_but_its_figures_names():
    metrics, run = OperatorMetrics(), make_run(sft("base"))
    attempt = Attempt(number=1, digest="d", state="Failed", failure="Internal", message=NASTY)
    status = RunStatus(phases=(PhaseStatus(name="base", type="sft", attempts=(attempt,), metrics={plain(NASTY): 1.0}),))
    metrics.run_seen(Key("ns", "test"), run, status)
    assert f'metric="{TAME}"' in metrics.page().decode()


def test_what_commands_say_is_text_alone(capsys):
    """A gate on a metric of this name set a terminal's title when the run was validated."""
    say('gates[0].metric: "\x1b]0;pwn\x07\x1b[31mX" is no metric\nof this phase', color="red", err=True)
    assert capsys.readouterr().err == 'gates[0].metric: "X" is no metric\nof this phase\n'


def test_an_event_of_the_future_is_not_the_newest():
    """It is anybody's who may write events: one of 2030 gave a run its reason for years."""

    def event(message: str, last: str, created: str):
        return {"reason": "R", "message": message, "lastTimestamp": last, "metadata": {"creationTimestamp": created}}

    forged = event("forged", "2999-01-01T00:00:00Z", "2026-01-01T00:00:00Z")
    real = event("real", after(seconds=-1).isoformat(), "2026-01-01T00:00:01Z")
    later = event("later", after(seconds=5).isoformat(), "2026-01-01T00:00:02Z")
    assert observe.warning([forged, real, later], after(seconds=5)) == "R: later"
    assert observe.warning([real, later], after(seconds=5)) == "R: later"
    assert observe.warning([real], START) == "R: real"

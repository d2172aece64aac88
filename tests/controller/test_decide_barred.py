"""A job that may not be made now: a full quota, or a right that somebody has taken away. It is waited for."""

from dataclasses import replace

from builders import START, job, seen, started, with_status
from stories import RUN, attempt, condition, ends, phase, story

from controller.api import meta
from controller.operator import events
from controller.plan.decide import decide

FULL = replace(seen(), barred={("base", 1): "pytorchjobs is forbidden: exceeded quota"})


def test_it_waits_says_so_and_is_asked_for_again() -> None:
    first, waits, again = story((RUN, seen(), 0), (RUN, FULL, 15), (RUN, FULL, 90_000))
    assert started(first) == started(waits) == started(again) == ["base-1"]
    assert condition(waits, meta.PROGRESSING) == "True/JobForbidden"
    assert (
        phase(waits).message == "waits, because its job may not be made now: pytorchjobs is forbidden: exceeded quota"
    )
    assert again.status == waits.status
    assert [e.reason for e in events.transitions(first.status, waits.status)] == ["JobForbidden"]
    assert not list(events.transitions(waits.status, again.status))


def test_when_there_is_room_it_is_as_if_nothing_had_been() -> None:
    *_, runs = story((RUN, seen(), 0), (RUN, FULL, 15), (RUN, seen(job(RUN, "base", running_since=START)), 30))
    assert (ends(runs), attempt(runs).message, condition(runs, meta.PROGRESSING)) == (
        "Running",
        "",
        "True/PhasesRunning",
    )


def test_a_word_about_another_attempt_is_not_taken_for_this_ones() -> None:
    running = replace(FULL, jobs=(job(RUN, "base"),))
    (first,) = story((RUN, seen(), 0))
    assert "quota" not in phase(decide(with_status(RUN, first), running, START)).message


def test_it_says_so_on_fewer_nodes_than_were_wanted_too() -> None:
    (first,) = story((RUN, seen(), 0))
    run = with_status(RUN, first)
    (found,) = first.status.phases
    fewer = found.attempts[0].model_copy(update={"nodes": 1, "placed": 0})
    wanted = RUN.spec.template.model_copy(update={"nodes": 2, "min_nodes": 1})
    status = first.status.model_copy(update={"phases": (found.model_copy(update={"attempts": (fewer,)}),)})
    spec = RUN.spec.model_copy(update={"template": wanted})
    waits = decide(run.model_copy(update={"status": status, "spec": spec}), FULL, START)
    assert phase(waits).message.startswith("on 1 of 2 nodes; waits")
    assert condition(waits, meta.PROGRESSING) == "True/JobForbidden"

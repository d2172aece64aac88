"""Looks at runs from memory, which may be old: what is read anew, and what is put right."""

from dataclasses import replace

import pytest
from builders import after, dpo, job, make_run, results, seen, sft
from desk import RUN, Desk

from controller.api.run import AlignmentRun
from controller.kube.answers import ApiError, Conflict
from controller.kube.resources import RUNS
from controller.operator.reconciler import POLL
from controller.plan.observed import JobState, ObservedJob
from trainers.contract import FailureClass


def chain() -> tuple[Desk, AlignmentRun]:
    """A run of two phases, of which the first runs."""
    desk, run = Desk(), make_run(sft("base"), dpo("next", "base"))
    desk.edit(phases=[sft("base"), dpo("next", "base")])
    desk.look()
    desk.look(seen(job(run, "base", running_since=after(1))), at=1)
    return desk, run


class TestMemory:
    """What is remembered may be old; what is told of us may be our own."""

    def test_nothing_is_read_anew_but_for_a_start_and_an_end(self):
        desk = Desk()
        desk.look()
        assert desk.backend.anew == 1, "the job is asked for of what there is now"
        running = seen(job(RUN, "base", running_since=after(1)))
        for second in (1, 2, 3):
            desk.look(running, at=second)
        assert desk.backend.anew == 1
        desk.look(seen(results=results(RUN, "base")), at=4)
        assert desk.backend.anew == 2

    def test_what_follows_from_a_success_that_is_known_is_not_read_anew(self):
        desk, run = chain()
        done = seen(job(run, "base", state=JobState.SUCCEEDED), results=results(run, "base"))
        desk.look(done, at=2)
        assert desk.server.said[-2:] == ["status", "apply next-1"]
        assert desk.backend.anew == 1, "that the first job was asked for"

    @pytest.mark.parametrize(
        "doubt",
        [
            "without its word",
            "lives",
            "failed",
            "another's name",
            "another writes",
            "no room",
            "begun before",
            "to end",
        ],
    )
    def test_whatever_else_is_in_doubt_is_read_anew(self, doubt: str):
        desk, run = chain()
        first = job(run, "base", state=JobState.SUCCEEDED)
        done = seen(first, results=results(run, "base"))
        failed = job(run, "base", state=JobState.FAILED, failure=FailureClass.BAD_INPUT, finished_at=after(1))
        other = ObservedJob("next", 1, "another", JobState.LIVE)
        views = {
            "without its word": seen(first),
            "lives": replace(done, jobs=(job(run, "base"),)),
            "failed": seen(failed),
            "another's name": replace(done, taken={("next", 1): "somebody's"}),
            "another writes": replace(done, held={"next": "an earlier run's"}),
            "no room": replace(done, barred={("next", 1): "quota"}),
            "begun before": replace(done, jobs=(first, replace(other, state=JobState.FAILED))),
            "to end": replace(done, jobs=(first, other)),
        }
        desk.look(views[doubt], at=2)
        assert desk.backend.anew == 2

    def test_what_we_wrote_is_there_at_once_and_wakes_nobody(self):
        desk = Desk()
        desk.look()
        assert desk.server.stored is not None
        assert desk.memory.event(RUNS, "MODIFIED", desk.server.stored) is None
        desk.watched = False
        assert desk.look(seen(job(RUN, "base")), at=1) == POLL
        assert desk.server.said == ["status", "apply base-1", "status"]

    def test_nothing_is_started_for_what_a_run_was_before_an_edit(self):
        """The watch has not told of it yet, and no write would fail: the status says already that the job is asked for."""
        desk = Desk()
        desk.look()
        desk.look(seen(), at=1)
        desk.server.said.clear()
        desk.look(seen(), at=2)
        assert desk.server.said == ["apply base-1"]
        desk.edit(suspend=True)
        desk.watched = False
        with pytest.raises(Conflict):
            desk.look(seen(), at=3)
        assert desk.server.said == ["apply base-1"]
        desk.look(seen(), at=4)
        assert desk.status.is_true("Suspended"), "what was found out is remembered"

    def test_a_write_that_came_too_late_is_put_right_though_the_watch_is_silent(self):
        desk = Desk()
        desk.look()
        desk.edit(suspend=True)
        desk.watched = False
        with pytest.raises(Conflict):
            desk.look(seen(job(RUN, "base")), at=1)
        desk.look(seen(job(RUN, "base")), at=2)
        assert desk.server.said[-1] == "delete base-1"

    def test_a_run_that_is_gone_is_left_alone_though_the_watch_is_silent(self):
        desk = Desk()
        desk.look()
        desk.server.stored, desk.watched = None, False
        with pytest.raises(ApiError):
            desk.look(seen(), at=1)
        assert desk.server.said == ["status", "apply base-1"]

"""What is remembered of a run goes a day after the last look at it: of one that was deleted nobody tells."""

import asyncio
from datetime import UTC, datetime, timedelta

from builders import after
from pods import pod
from test_ownership import Shelf, a_run, backend, labels_on

from controller.api.run import AlignmentRun
from controller.backends.cluster.of_runs import FORGOTTEN_SECONDS, OfRuns


def test_runs_that_are_looked_at_stay_and_the_others_go():
    kept: OfRuns[int] = OfRuns()
    kept.put("gone", 1, after(0))
    kept.put("stays", 2, after(0))
    for hour in range(1, 49):
        assert kept.get("stays", after(3600 * hour)) == 2
    assert len(kept) == 1
    assert kept.take("gone") is None


def test_there_are_no_more_than_runs_of_a_day():
    kept: OfRuns[int] = OfRuns()
    for hour in range(10_000):
        kept.put(str(hour), hour, after(3600 * hour))
        assert len(kept) <= FORGOTTEN_SECONDS / 3600 + 1


def test_runs_that_are_deleted_while_they_wait_for_a_pod_leave_nothing_behind():
    clock = [datetime.now(UTC).replace(microsecond=0)]
    asked_of = backend(Shelf(pods=(labels_on(pod(running={"startedAt": "2026-01-01T00:00:00Z"})),)))
    asked_of.now = lambda: clock[0]

    def named(uid: str) -> AlignmentRun:
        run = a_run()
        return run.model_copy(update={"metadata": run.metadata.model_copy(update={"uid": uid})})

    for number in range(100):
        assert asyncio.run(asked_of.observe(named(f"run-{number}"))).held
        clock[0] += timedelta(hours=1)
    assert len(asked_of._orphans._since) <= 26

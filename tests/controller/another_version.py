"""One look at a run, by whichever version of the project is imported: as a program, and as a function of this one.

Reads ``{"run": …, "jobs": […], "results": {…}, "at": seconds}`` and says the status, what is started (with its phase file) and
what is stopped.
"""

import json
import sys
from datetime import UTC, datetime, timedelta
from typing import Any

from controller.api.run import AlignmentRun
from controller.backends.cluster.kind import Owner
from controller.backends.cluster.pod import phase_file
from controller.plan.decide import Apply, decide
from controller.plan.observed import JobState, Observed, ObservedJob, ObservedResult

START = datetime(2026, 1, 1, tzinfo=UTC)
OWNER = Owner("ns", "run", "u", "run")


def look(asked: dict[str, Any]) -> dict[str, Any]:
    run = AlignmentRun.model_validate(asked["run"])
    jobs = tuple(_job(**job) for job in asked["jobs"])
    results = {name: ObservedResult(*words) for name, words in asked["results"].items()}
    decision = decide(run, Observed(jobs=jobs, results=results), START + timedelta(seconds=asked["at"]))
    started = [action.job for action in decision.actions if isinstance(action, Apply)]
    return {
        "status": decision.status.document(),
        "started": {f"{job.phase}-{job.attempt}": json.loads(phase_file(job, OWNER)) for job in started},
        "stopped": [f"{a.phase}-{a.attempt}" for a in decision.actions if not isinstance(a, Apply)],
    }


def _job(phase: str, attempt: int, digest: str, state: str) -> ObservedJob:
    running = START if state == "Live" else None
    return ObservedJob(phase, attempt, digest, JobState(state), started_at=START, running_since=running)


if __name__ == "__main__":
    json.dump(look(json.load(sys.stdin)), sys.stdout)

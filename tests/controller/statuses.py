"""Statuses as large as they can be, and what they take where they are kept."""

import json

from builders import START, make_run, sft

from controller.api.run import AlignmentRun
from controller.api.status import Attempt, AttemptState, PhaseState, PhaseStatus, RunStatus
from trainers.contract import FailureClass


def crowded(n: int) -> tuple[AlignmentRun, RunStatus]:
    """As much as there can be to say of each of n phases."""
    gates = [{"metric": "parameters", "atLeast": 1}]
    run = make_run(*({"name": f"{'p' * 27}-{i:02}", "sft": sft("x")["sft"] | {"gates": gates}} for i in range(n)))
    digest = "d" * 64
    failed = [
        Attempt(
            number=i, digest=digest, settings="s" * 16, state=AttemptState.FAILED, failure=list(FailureClass)[i % 9],
            message="\x07" * 1024, job="j" * 50, node="n" * 253, started_at=START, finished_at=START, times=9,
        ) for i in range(1, 17)
    ]  # fmt: skip
    live = Attempt(number=17, digest=digest, settings="s" * 16, state=AttemptState.RUNNING, started_at=START)
    figures = {f"figure/{i}": 1 / 3 for i in range(200)} | {"parameters": 7.0}
    phases = [
        PhaseStatus(
            name=entry.name, type="sft", digest=digest, artifact_digest=digest, state=PhaseState.RUNNING,
            message="m" * 1024, needs="n" * 300, attempts=(*failed, live), metrics=figures, started_at=START,
        ) for entry in run.phases
    ]  # fmt: skip
    return run, RunStatus(phases=tuple(phases))


def stored(thing: object) -> int:
    """As Go writes JSON, which is what etcd keeps."""
    text = json.dumps(thing, ensure_ascii=False, separators=(",", ":"))
    for char in "<>&":
        text = text.replace(char, f"\\u{ord(char):04x}")
    return len(text.encode())

"""Readable inputs for tables: runs with little in them, and observations."""

from datetime import UTC, datetime, timedelta
from typing import Any

from controller.api.run import AlignmentRun
from controller.api.status import RunStatus
from controller.plan.decide import Apply, Decision, Delete, rests
from controller.plan.leftovers import next_chore
from controller.plan.observed import JobState, Observed, ObservedJob, ObservedResult
from controller.plan.resolve import resolve
from trainers.contract import phase_digest

START = datetime(2026, 1, 1, tzinfo=UTC)
DATA = {"train": [{"synthetic": {"task": "letters", "split": "demonstrations", "count": 8}}]}
PAIRS = {"train": [{"synthetic": {"task": "letters", "split": "preferences", "count": 8}}]}
PROMPTS = {"prompts": [{"synthetic": {"task": "letters", "split": "prompts", "count": 8}}]}
SCRATCH = {"scratch": {"hiddenSize": 8, "numLayers": 1, "tokenizer": {"trainOn": DATA["train"]}}}


def after(seconds: float) -> datetime:
    return START + timedelta(seconds=seconds)


def sft(name: str, on: str | None = None, **settings: Any) -> dict[str, Any]:
    model = {"phase": on} if on else SCRATCH
    return {"name": name, "sft": {"model": model, "data": DATA, **settings}}


def reward(name: str, on: str) -> dict[str, Any]:
    return {"name": name, "reward": {"model": {"phase": on}, "data": PAIRS}}


def dpo(name: str, on: str, **settings: Any) -> dict[str, Any]:
    return {"name": name, "dpo": {"policy": {"phase": on}, "data": PAIRS, **settings}}


def ppo(name: str, on: str, reward_model: str, **settings: Any) -> dict[str, Any]:
    return {
        "name": name,
        "ppo": {"policy": {"phase": on}, "rewardModel": {"phase": reward_model}, "data": PROMPTS, **settings},
    }


def document(*phases: dict[str, Any], **spec: Any) -> dict[str, Any]:
    return {
        "apiVersion": "alignment.dev/v1alpha1",
        "kind": "AlignmentRun",
        "metadata": {"name": "test"},
        "spec": {**spec, "phases": list(phases)},
    }


def make_run(*phases: dict[str, Any], **spec: Any) -> AlignmentRun:
    return AlignmentRun.model_validate(document(*phases, **spec))


def diamond(**spec: Any) -> AlignmentRun:
    """base; dpo and reward beside each other; ppo on both."""
    return make_run(sft("base"), dpo("dpo", "base"), reward("reward", "base"), ppo("ppo", "base", "reward"), **spec)


def artifact(name: str) -> str:
    return f"artifact-of-{name}"


def digests(run: AlignmentRun) -> dict[str, str]:
    """What every phase's digest is once its inputs have left ``artifact(name)``."""
    return {
        p.name: phase_digest(p.type.name, p.spec, p.image, {name: artifact(name) for name in p.inputs})
        for p in resolve(run)
    }


def results(run: AlignmentRun, *names: str) -> dict[str, ObservedResult]:
    known = digests(run)
    return {name: ObservedResult(known[name], artifact(name)) for name in names}


def job(run: AlignmentRun, phase: str, attempt: int = 1, state: JobState = JobState.LIVE, **more: Any) -> ObservedJob:
    return ObservedJob(phase=phase, attempt=attempt, digest=digests(run)[phase], state=state, **more)


def seen(*jobs: ObservedJob, capacity: int | None = None, **more: Any) -> Observed:
    return Observed(jobs=jobs, capacity=capacity, **more)


def started(decision: Decision) -> list[str]:
    return [f"{a.job.phase}-{a.job.attempt}" for a in decision.actions if isinstance(a, Apply)]


def stopped(decision: Decision) -> list[str]:
    return [f"{a.phase}-{a.attempt}" for a in decision.actions if isinstance(a, Delete)]


def with_status(run: AlignmentRun, decision: Decision) -> AlignmentRun:
    return run.model_copy(update={"status": decision.status})


def is_settled(run: AlignmentRun) -> bool:
    """Whether nothing but an edit, or somebody who asks, can ever change anything."""
    return rests(run) and next_chore(run, run.status or RunStatus()) is None

"""The planner when only what cannot change a result is edited: gates, memory settings, budgets of memory."""

from typing import Any

import pytest
from builders import DATA, START, after, artifact, digests, job, make_run, seen, sft, started, with_status

from controller.api import meta
from controller.api.run import AlignmentRun
from controller.api.status import PhaseState
from controller.plan.decide import Apply, Decision, decide
from controller.plan.observed import JobState, ObservedResult
from trainers.contract import FailureClass

OOM = FailureClass.OUT_OF_MEMORY


def gated(at_least: float, metric: str = "evalLoss", **more: Any) -> AlignmentRun:
    data = {**DATA, "eval": DATA["train"]}
    gates = [{"metric": metric, "atLeast": at_least}]
    return make_run(sft("base", data=data, gates=gates), sft("next", "base"), **more)


def edited(run: AlignmentRun, decision: Decision) -> AlignmentRun:
    """Another generation of the run, with the status so far."""
    metadata = run.metadata.model_copy(update={"generation": 2})
    return with_status(run, decision).model_copy(update={"metadata": metadata})


def left(run: AlignmentRun, **metrics: float) -> dict[str, ObservedResult]:
    return {"base": ObservedResult(digests(run)["base"], artifact("base"), metrics)}


def base(decision: Decision) -> tuple[PhaseState, str]:
    phase = decision.status.phases[0]
    return phase.state, phase.message


# ---------------------------------------------------------------- gates


def test_a_result_that_misses_its_gate_has_failed_and_nothing_builds_on_it() -> None:
    run = gated(0.9)
    decision = decide(run, seen(results=left(run, evalLoss=0.5)), START)
    assert base(decision) == (PhaseState.FAILED, "gate missed: evalLoss is 0.5, must be at least 0.9")
    assert decision.status.phases[0].failure == FailureClass.GATE_FAILED
    assert decision.status.phases[1].state == PhaseState.BLOCKED
    assert decision.status.is_true(meta.FAILED)
    assert not decision.actions


def test_an_eased_gate_lets_what_was_finished_pass_without_another_attempt() -> None:
    run = gated(0.9)
    failed = job(run, "base", state=JobState.FAILED, failure=FailureClass.GATE_FAILED)
    before = decide(run, seen(failed, results=left(run, evalLoss=0.5)), START)
    again = edited(gated(0.4), before)
    for observed in (seen(failed, results=left(run, evalLoss=0.5)), seen()):  # seen, and remembered only
        decision = decide(again, observed, after(60))
        assert base(decision)[0] == PhaseState.SUCCEEDED
        assert started(decision) == ["next-1"]


def test_a_stricter_gate_fails_what_had_passed() -> None:
    run = gated(0.4)
    before = decide(run, seen(results=left(run, evalLoss=0.5)), START)
    assert base(before)[0] == PhaseState.SUCCEEDED
    assert base(decide(edited(gated(0.9), before), seen(), after(60)))[0] == PhaseState.FAILED


def test_a_gate_on_a_figure_that_is_not_remembered_is_judged_by_another_attempt() -> None:
    """A pod's last word has room for some metrics only."""
    run = gated(0.4)
    before = decide(run, seen(results=left(run, evalLoss=0.5)), START)
    new = edited(gated(0.4, "parameters"), before)
    decision = decide(new, seen(), after(60))
    assert started(decision) == ["base-1"]
    word = job(new, "base", state=JobState.SUCCEEDED)
    passed = decide(with_status(new, decision), seen(word, results=left(new, parameters=9.0)), after(90))
    assert base(passed)[0] == PhaseState.SUCCEEDED


# ---------------------------------------------------------------- out of memory


def test_every_attempt_after_running_out_of_memory_has_half_of_what_memory_goes_into() -> None:
    run, tokens = small(8192), []
    jobs: list[Any] = []
    for number in range(1, 5):
        decision = decide(run, seen(*jobs), after(10_000 * number))
        tokens += [_tokens(decision)]
        run = with_status(run, decision)
        assert decision.status.phases[0].attempts[-1].halvings == number - 1, "recorded"
        jobs.append(job(run, "base", number, JobState.FAILED, failure=OOM, finished_at=after(10_000 * number)))
    assert tokens == [8192, 4096, 2048, 1024]
    assert decide(run, seen(*jobs), after(90_000)).status.is_true(meta.FAILED), "bounded by its budget"


def test_what_was_halved_stays_so_after_another_failure_and_when_it_is_asked_for_again() -> None:
    run = small(8192)
    out = job(run, "base", 1, JobState.FAILED, failure=OOM, finished_at=START)
    first = decide(run, seen(out), after(100))
    run = with_status(run, first)
    assert _tokens(decide(run, seen(out), after(101))) == 4096, "asked for again, because nobody sees it"
    lost = job(run, "base", 2, JobState.FAILED, failure=FailureClass.INFRASTRUCTURE, finished_at=after(200))
    assert _tokens(decide(run, seen(out, lost), after(9_000))) == 4096


def test_halving_can_be_switched_off() -> None:
    run = small(8192, failurePolicy={"halveOnOutOfMemory": False})
    out = job(run, "base", 1, JobState.FAILED, failure=OOM, finished_at=START)
    assert _tokens(decide(run, seen(out), after(100))) == 8192


def test_it_ends_at_what_the_field_allows() -> None:
    run = small(9, failurePolicy={"retries": {"outOfMemory": 5}})
    outs = [job(run, "base", n, JobState.FAILED, failure=OOM, finished_at=START) for n in (1, 2, 3)]
    assert _tokens(decide(run, seen(*outs), after(9_000))) == 8


def test_an_edit_of_what_cannot_change_the_result_forgives_failures_and_keeps_the_digest() -> None:
    run = small(8192, failurePolicy={"retries": {"outOfMemory": 0}})
    out = job(run, "base", 1, JobState.FAILED, failure=OOM, finished_at=START)
    asked = with_status(run, decide(run, seen(), START))
    failed = decide(asked, seen(out), after(10))
    assert failed.status.is_true(meta.FAILED)
    new = edited(small(512, failurePolicy={"retries": {"outOfMemory": 0}}), failed)
    decision = decide(new, seen(out), after(20))
    assert started(decision) == ["base-2"]
    assert _tokens(decision) == 512
    assert digests(new) == digests(run), "so it goes on from the checkpoint"


def small(tokens: int, **more: Any) -> AlignmentRun:
    return make_run(sft("base", parallel={"microBatchTokens": tokens}), **more)


def _tokens(decision: Decision) -> int:
    (action,) = decision.actions
    assert isinstance(action, Apply)
    found: int = action.job.spec["parallel"]["microBatchTokens"]
    return found


# ---------------------------------------------------------------- fewer nodes


@pytest.mark.parametrize("failure", [FailureClass.INFRASTRUCTURE, FailureClass.INTERNAL, OOM])
def test_a_failed_run_goes_on_with_fewer_nodes_once_it_is_edited(failure: FailureClass) -> None:
    run = on_nodes(2, failurePolicy=NO_RETRIES)
    gone = job(run, "base", 1, JobState.FAILED, failure=failure, finished_at=START)
    asked = with_status(run, decide(run, seen(), START))
    failed = decide(asked, seen(gone), after(10))
    assert failed.status.is_true(meta.FAILED)
    fewer = on_nodes(1, failurePolicy=NO_RETRIES)
    assert_goes_on(run, fewer, decide(edited(fewer, failed), seen(gone), after(20)))


def test_a_suspended_run_goes_on_with_fewer_nodes() -> None:
    run = on_nodes(2)
    asked = with_status(run, decide(run, seen(), START))
    asleep = on_nodes(2, suspend=True)
    stopping = decide(edited(asleep, decide(asked, seen(job(run, "base")), after(1))), seen(job(run, "base")), after(2))
    stopped = job(run, "base", 1, JobState.FAILED, failure=FailureClass.INTERRUPTED, finished_at=after(3))
    settled = decide(edited(asleep, stopping), seen(stopped), after(4))
    fewer = on_nodes(1)
    assert_goes_on(run, fewer, decide(edited(fewer, settled), seen(stopped), after(5)))


NO_RETRIES = {"retries": {"outOfMemory": 0, "infrastructure": 0, "internal": 0}}


def on_nodes(count: int, **more: Any) -> AlignmentRun:
    return make_run(sft("base"), template={"nodes": count}, **more)


def assert_goes_on(run: AlignmentRun, fewer: AlignmentRun, decision: Decision) -> None:
    (action,) = decision.actions
    assert isinstance(action, Apply)
    assert (started(decision), action.job.nodes) == (["base-2"], 1)
    assert action.job.digest == digests(run)["base"] == digests(fewer)["base"], "so it goes on from the checkpoint"

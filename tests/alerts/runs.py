"""Scenarios of the alerts about runs, which the operator's series tell of."""

from alerts.scenario import LEADER, OTHER, PHASE, RUN, Fires, Scenario, operator, running, silent, trainer, training

OTHER_RUN = {"namespace": "team-b", "run": "other"}
OTHER_PHASE = {**OTHER_RUN, "phase": "ppo", "type": "ppo"}


def state(name: str, values: str, labels=RUN, pod: str = LEADER):
    return operator("run_state", values, labels, pod, state=name)


def phase_state(name: str, values: str, labels=PHASE, pod: str = LEADER):
    return operator("phase_state", values, labels, pod, state=name)


# ---------------------------------------------------------------- stalled

STALLED = Fires(
    "AlignmentRunStalled",
    PHASE,
    "Phase dpo of run team-a/helpful makes no progress",
    "The phase has finished no step for longer than the run's failurePolicy.stalledAfterSeconds (900 s unless set). "
    "Its pods keep their GPUs; nothing is stopped unless failurePolicy.stallTimeoutSeconds is set.",
)
# Its last step was at minute 10; the operator says so from minute 25 on, until another attempt is at work.
SAID_STALLED = {**state("Running", "1x24 stale _x20 1x60"), **state("Stalled", "_x25 1x20 stale")}
SIBLING = {**RUN, "phase": "reward", "type": "reward"}

STALLS = (
    Scenario(
        "a phase hangs, is restarted at minute 46",
        {
            **SAID_STALLED,
            **phase_state("Running", "1x60"),
            **trainer("last_step_timestamp_seconds", "0+60x10 600x35 stale"),
        },
        {24: (), 30: (STALLED,), 44: (STALLED,), 50: ()},
    ),
    Scenario(
        "a phase hangs so badly that it serves no metrics either",
        {
            **SAID_STALLED,
            **phase_state("Running", "1x60"),
            **trainer("last_step_timestamp_seconds", "0+60x10 stale"),
        },
        {30: (STALLED,), 50: ()},
    ),
    Scenario(
        "of two phases one hangs: the other is not blamed, nor is another run",
        {
            **SAID_STALLED,
            **phase_state("Running", "1x60"),
            **phase_state("Running", "1x60", SIBLING),
            **trainer("last_step_timestamp_seconds", "0+60x10 600x50"),
            **trainer("last_step_timestamp_seconds", "0+60x60", SIBLING, "helpful-reward-1-worker-0"),
            **running(60, OTHER_PHASE),
            **trainer("last_step_timestamp_seconds", "0+60x60", OTHER_PHASE, "other-ppo-1-worker-0"),
        },
        {30: (STALLED,)},
    ),
    Scenario(
        "steps of 40 minutes, and a run that allows for them: what it says counts, not the age of a step",
        {**running(), **trainer("last_step_timestamp_seconds", "0x39 2400x39 4800x39 7200x39")},
        silent(30, 70, 110, 150),
        nearly=("AlignmentRunStalled",),
    ),
    Scenario(
        "a stalled run is suspended",
        {
            **state("Stalled", "1x2 stale"),
            **state("Suspended", "_x3 1x60"),
            **phase_state("Running", "1x2 stale"),
            **phase_state("Suspended", "_x3 1x60"),
        },
        silent(4, 10, 60),
        nearly=("AlignmentRunStalled",),
    ),
    Scenario(
        "a stalled run fails: it is told of as failed",
        {
            **state("Stalled", "1x1 stale"),
            **state("Failed", "_x2 1x200"),
            **phase_state("Running", "1x1 stale"),
            **phase_state("Failed", "_x2 1x200"),
        },
        silent(5, 60),
        nearly=("AlignmentRunStalled",),
    ),
)

# ---------------------------------------------------------------- the first step

INFO = {"version": "0.1.0", "device": "cuda", "processes": "8"}
FIRST_STEP = Fires(
    "AlignmentFirstStepOverdue",
    PHASE,
    "Phase dpo of run team-a/helpful has not finished its first step after an hour",
    "The dpo phase has run for an hour and is still loading, or its processes wait for each other.",
)
FIRST_STEPS = (
    Scenario(
        "processes wait for each other for ever",
        {**running(), **trainer("info", "1x200", **INFO)},
        {30: (), 59: (), 65: (FIRST_STEP,)},
    ),
    Scenario(
        "a large model takes 50 minutes to load",
        {**running(), **trainer("info", "1x200", **INFO), **trainer("step", "_x50 1+1x150")},
        silent(40, 65, 120),
        nearly=("AlignmentFirstStepOverdue",),
    ),
    Scenario(
        "an attempt that loads ends after 40 minutes, its successor too",
        {
            **running(),
            **trainer("info", "1x40 stale", **INFO),
            **trainer("info", "_x45 1x40 stale", pod="helpful-dpo-2-worker-0", **INFO),
        },
        silent(39, 65, 84, 100),
        nearly=("AlignmentFirstStepOverdue",),
    ),
)

# ---------------------------------------------------------------- diverged, failed


def failure(name: str, used: str, allowed: str, labels=PHASE, pod: str = LEADER):
    return {
        **operator("phase_retries_used", used, labels, pod, **{"class": name}),
        **operator("phase_retries_allowed", allowed, labels, pod, **{"class": name}),
    }


DIVERGED = Fires(
    "AlignmentPhaseDiverged",
    PHASE,
    "Phase dpo of run team-a/helpful has diverged",
    "The loss, the gradient or the reward of the dpo phase was not finite, so it has ended and is not tried again. Phases "
    "that build on it cannot run.",
)


def failed(ago: str) -> Fires:
    return Fires(
        "AlignmentRunFailed",
        RUN,
        "Run team-a/helpful has failed",
        f"The run ended {ago} ago with a phase that failed for good or a deadline that passed. What is finished is kept. "
        "This alert ends an hour after the run.",
    )


def ended(minute: int, how: str, pod: str = LEADER):
    """Of a phase and its run, at once."""
    before, after, at = f"1x{minute - 1} stale", f"_x{minute} 1x300", f"_x{minute} {60 * minute}x300"
    return {
        **state("Running", before, pod=pod),
        **state(how, after, pod=pod),
        **phase_state("Running", before, pod=pod),
        **phase_state(how, after, pod=pod),
        **operator("run_end_timestamp_seconds", at, RUN, pod),
        **operator("phase_end_timestamp_seconds", at, PHASE, pod),
    }


ENDS = (
    Scenario(
        "a phase diverges at minute 10, and the run fails with it",
        {**ended(10, "Failed"), **failure("Diverged", "_x10 1x300", "_x10 0x300")},
        {9: (), 10: (DIVERGED, failed("0s")), 40: (DIVERGED, failed("30m 0s")), 75: (), 200: ()},
    ),
    Scenario(
        "a phase diverges, and others of its run go on",
        {
            **state("Running", "1x300"),
            **phase_state("Failed", "1x300"),
            **operator("phase_end_timestamp_seconds", "0x300", PHASE),
            **failure("Diverged", "1x300", "0x300"),
        },
        {5: (DIVERGED,), 65: ()},
    ),
    Scenario(
        "another replica takes over meanwhile: told once",
        {
            **ended(10, "Failed"),
            **failure("Diverged", "_x10 1x300", "_x10 0x300"),
            **{s.replace(LEADER, OTHER): v for s, v in ended(10, "Failed").items()},
            **failure("Diverged", "_x10 1x300", "_x10 0x300", pod=OTHER),
        },
        {40: (DIVERGED, failed("30m 0s"))},
    ),
    Scenario(
        "a run that failed yesterday, when the operator or Prometheus starts",
        {
            **state("Failed", "1x300"),
            **phase_state("Failed", "1x300"),
            **operator("run_end_timestamp_seconds", "-86400x300", RUN),
            **operator("phase_end_timestamp_seconds", "-86400x300", PHASE),
            **failure("Diverged", "1x300", "0x300"),
        },
        silent(1, 60),
        nearly=("AlignmentPhaseDiverged", "AlignmentRunFailed"),
    ),
    Scenario(
        "a phase that diverged has other settings now: what it was does not count",
        {
            **state("Failed", "1x9 stale"),
            **state("Running", "_x10 1x90"),
            **phase_state("Running", "_x10 1x90"),
            **operator("run_end_timestamp_seconds", "_x5 300x4 stale", RUN),
            **failure("Diverged", "_x5 1x4 stale", "_x5 0x4 stale"),
        },
        silent(11, 60),
        nearly=("AlignmentPhaseDiverged", "AlignmentRunFailed"),
    ),
    Scenario(
        "a run succeeds",
        ended(10, "Succeeded"),
        silent(9, 10, 11, 70),
        nearly=("AlignmentRunFailed",),
    ),
    Scenario(
        "a run is refused: whoever applied it was told, and nothing had begun",
        state("Failed", "1x60"),
        silent(1, 30),
        nearly=("AlignmentRunFailed",),
    ),
    Scenario(
        "a phase failed for another reason and is tried again",
        {**running(), **failure("Infrastructure", "1x60", "5x60")},
        silent(5, 30),
        nearly=("AlignmentPhaseDiverged", "AlignmentRetryBudgetLow"),
    ),
)

# ---------------------------------------------------------------- retries


def budget_low(left: str, name: str) -> Fires:
    return Fires(
        "AlignmentRetryBudgetLow",
        {**PHASE, "class": name},
        f"Phase dpo of run team-a/helpful has {left} retries left after failures of class {name}",
        f"The dpo phase has failed with {name}. When its budget for that class (failurePolicy.retries) is used up, the "
        "next such failure ends it for good.",
    )


RETRIES = (
    Scenario(
        "the fourth of five retries after failures of the infrastructure",
        {**running(), **failure("Infrastructure", "1x9 2x9 3x9 4x60", "5x100")},
        {5: (), 25: (), 35: (budget_low("1", "Infrastructure"),)},
    ),
    Scenario(
        "the only retry after running out of memory; it waits before it",
        {
            **state("Running", "1x60"),
            **phase_state("BackingOff", "1x60"),
            **failure("OutOfMemory", "1x60", "1x60"),
        },
        {2: (budget_low("0", "OutOfMemory"),)},
    ),
    Scenario(
        "the phase succeeds with its last retry",
        {**ended(10, "Succeeded"), **failure("Infrastructure", "5x300", "5x300")},
        {5: (budget_low("0", "Infrastructure"),), 11: (), 60: ()},
        nearly=("AlignmentRetryBudgetLow",),
    ),
    Scenario(
        "the budget is more than used up: that is a failed run",
        {**ended(10, "Failed"), **failure("Infrastructure", "5x9 6x300", "5x300")},
        {11: (failed("1m 0s"),), 80: ()},
    ),
    Scenario(
        "a suspended run with nothing left of its budget",
        {
            **state("Suspended", "1x60"),
            **phase_state("Suspended", "1x60"),
            **failure("Infrastructure", "5x60", "5x60"),
        },
        silent(5, 59),
        nearly=("AlignmentRetryBudgetLow",),
    ),
    Scenario(
        "preempted seven times of ten",
        {**running(), **failure("Interrupted", "7x60", "10x60")},
        silent(5, 59),
        nearly=("AlignmentRetryBudgetLow",),
    ),
)

# ---------------------------------------------------------------- the queue

QUEUED = Fires(
    "AlignmentQueueWaitLong",
    RUN,
    "Run team-a/helpful has waited in its queue for two hours",
    "Nothing of the run is admitted: its Kueue queue has no quota to give, or does not exist.",
)
QUEUES = (
    Scenario(
        "a queue without quota",
        {**state("Queued", "1x300"), **phase_state("Running", "1x300")},
        {60: (), 119: (), 121: (QUEUED,), 250: (QUEUED,)},
    ),
    Scenario(
        "the operator is rolled out twice meanwhile: the wait goes on",
        {
            **state("Queued", "1x59 stale"),
            **state("Queued", "_x62 1x30 stale", pod=OTHER),
            **state("Queued", "_x96 1x200", pod="alignment-operator-c"),
        },
        {110: (), 125: (QUEUED,)},
    ),
    Scenario(
        "admitted after 110 minutes",
        {**state("Queued", "1x109 stale"), **state("Running", "_x110 1x200"), **phase_state("Running", "1x310")},
        silent(109, 119, 121, 200),
        nearly=("AlignmentQueueWaitLong",),
    ),
    Scenario(
        "preempted again and again, for an hour each time",
        {**state("Queued", "1x59 stale _x20 1x59 stale _x20 1x59"), **state("Running", "_x60 1x20 stale _x59 1x20")},
        silent(59, 121, 139, 200),
        nearly=("AlignmentQueueWaitLong",),
    ),
    Scenario(
        "suspended for five hours",
        {**state("Suspended", "1x300"), **phase_state("Suspended", "1x300")},
        silent(10, 200, 299),
        nearly=("AlignmentQueueWaitLong", "AlignmentRunStalled"),
    ),
)

SCENARIOS = (
    *STALLS,
    *FIRST_STEPS,
    *ENDS,
    *RETRIES,
    *QUEUES,
    Scenario("a run at work for five hours", {**running(), **training()}, silent(1, 30, 90, 300)),
)

"""Scenarios of the alerts about the operator itself."""

from alerts.scenario import (
    LEADER,
    OTHER,
    Fires,
    Scenario,
    Series,
    healthy_operator,
    operator,
    running,
    silent,
    training,
)

SYSTEM = {"namespace": "alignment-system"}
WATCH = {"resource": "pytorchjobs"}

DOWN = Fires(
    "AlignmentOperatorDown",
    SYSTEM,
    "The alignment operator in alignment-system is down",
    "Prometheus sees no replica of the operator. Trainers that run go on; nothing new starts, nothing is retried, and no "
    "status changes.",
)
NO_LEADER = Fires(
    "AlignmentOperatorNoLeader",
    SYSTEM,
    "No replica of the alignment operator in alignment-system acts",
    "Replicas run, but none holds the Lease alignment-operator, so nothing starts, nothing is retried, and no status changes.",
)
TWO = Fires(
    "AlignmentOperatorTwoLeaders",
    SYSTEM,
    "2 replicas of the alignment operator in alignment-system act at once",
    "Only the one that holds the Lease may act. Two can start the same attempt; Kubernetes refuses the second job of a name, "
    "but statuses contradict each other.",
)
IDLE = Fires(
    "AlignmentOperatorNotReconciling",
    {**SYSTEM, "pod": LEADER},
    "The alignment operator in alignment-system looks at no run",
    f"Replica {LEADER} acts and there is work (phases that run are looked at every 15 seconds), but it has finished no look "
    "for ten minutes.",
)
BUG = Fires(
    "AlignmentOperatorReconcileErrors",
    {**SYSTEM, "pod": LEADER},
    "The alignment operator in alignment-system meets an unexpected error",
    "Looks at a run have ended with an error that nobody foresaw, 5 times in ten minutes. That run does not go on; the others "
    "do. The log has the traceback.",
)
DEAD = Fires(
    "AlignmentOperatorWatchDead",
    {**SYSTEM, **WATCH},
    "A watch of pytorchjobs has died in the alignment operator in alignment-system",
    "In the last fifteen minutes pytorchjobs changed and the watch said nothing. The kubelet restarts such a replica; if this "
    "goes on, restarting does not help.",
)
CREATE = {"verb": "create", "resource": "pytorchjobs"}


def errors(share: str) -> Fires:
    return Fires(
        "AlignmentOperatorApiErrors",
        {**SYSTEM, **CREATE},
        f"{share} of the alignment operator's calls to create pytorchjobs fail",
        "The operator in alignment-system is refused by the API server, or cannot reach it. It tries again, more and more "
        "slowly.",
    )


def calls(code: str, values: str, pod: str = LEADER):
    return operator("api_requests_total", values, CREATE, pod, code=code)


def leads(values: str, pod: str = LEADER):
    return operator("leader", values, pod=pod)


def looks(values: str, outcome: str = "ok", pod: str = LEADER):
    return operator("reconcile_seconds_count", values, pod=pod, outcome=outcome)


def elsewhere(series: Series) -> Series:
    """The same in another namespace."""
    return {name.replace("alignment-", "elsewhere-"): values for name, values in series.items()}


def replica(minutes: str, pod: str, leader: str):
    return {**operator("info", minutes, pod=pod, version="0.1.0"), **leads(leader, pod)}


REPLICAS = (
    Scenario("both replicas are gone", {}, {3: (), 6: (DOWN,), 60: (DOWN,)}, operator=False),
    Scenario(
        "another installation is well, this one is gone",
        elsewhere(healthy_operator(60)),
        {3: (), 6: (DOWN,), 60: (DOWN,)},
        operator=False,
    ),
    Scenario(
        "one of two replicas is gone, and the other acts",
        {**replica("1x9 stale", LEADER, "1x9 stale"), **replica("1x60", OTHER, "0x10 1x50")},
        silent(9, 11, 20, 60),
        nearly=("AlignmentOperatorDown", "AlignmentOperatorNoLeader"),
        operator=False,
    ),
    Scenario(
        "a node is lost with the only replica, and a new one is there after four minutes",
        {**replica("1x9 stale", LEADER, "1x9 stale"), **replica("_x14 1x60", OTHER, "_x14 0x1 1x60")},
        silent(9, 13, 15, 20, 60),
        nearly=("AlignmentOperatorDown", "AlignmentOperatorNoLeader"),
        operator=False,
    ),
    Scenario(
        "nobody may write the Lease",
        {**replica("1x60", LEADER, "0x60"), **replica("1x60", OTHER, "0x60")},
        {2: (), 4: (NO_LEADER,), 60: (NO_LEADER,)},
        operator=False,
    ),
    Scenario(
        "two act at once",
        {**leads("1x60", OTHER), **looks("0+4x60", pod=OTHER)},
        {2: (), 4: (TWO,), 60: (TWO,)},
    ),
    Scenario(
        "a change of the acting replica, seen by two scrapes of which one is older",
        {**leads("1x10 0x50"), **leads("0x9 1x60", OTHER), **looks("0+4x60", pod=OTHER)},
        silent(9, 10, 11, 12, 30),
        nearly=("AlignmentOperatorTwoLeaders",),
    ),
    Scenario(
        "one replica that is scraped twice, by a PodMonitor and a ServiceMonitor",
        {name.replace('job="alignment-operator"', 'job="again"'): v for name, v in healthy_operator(60).items()},
        silent(5, 60),
        nearly=("AlignmentOperatorTwoLeaders",),
    ),
    Scenario(
        "two installations, each with namespaces of its own",
        elsewhere(healthy_operator(60)),
        silent(5, 60),
        nearly=("AlignmentOperatorTwoLeaders",),
    ),
)  # fmt: skip

LOOKS = (
    Scenario(
        "all workers hang while a phase runs",
        {**running(), **looks("0+4x30 120x60")},
        {29: (), 40: (), 47: (IDLE,)},
    ),
    Scenario(
        "a new leader never begins, although runs are there",
        {**replica("1x60", LEADER, "1x60"), **operator("watch_events_total", "3x60", {"resource": "alignmentruns"})},
        {4: (), 6: (IDLE,)},
        operator=False,
    ),
    Scenario(
        "runs wait that nobody takes",
        {**looks("0+4x30 120x60"), **operator("workqueue_depth", "0x30 3x60")},
        {29: (), 47: (IDLE,)},
    ),
    Scenario(
        "all runs have ended, so there is nothing to look at",
        {
            **looks("0+4x30 120x300"),
            **operator("phase_state", "1x300", {"namespace": "team-a", "run": "r", "phase": "p"}, state="Succeeded"),
        },
        silent(29, 47, 300),
        nearly=("AlignmentOperatorNotReconciling",),
    ),
    Scenario(
        "a phase waits twenty minutes before its next attempt",
        {
            **looks("0+4x30 120x20 120+4x60"),
            **operator("phase_state", "1x110", {"namespace": "team-a", "run": "r", "phase": "p"}, state="BackingOff"),
        },
        silent(40, 47, 60),
        nearly=("AlignmentOperatorNotReconciling",),
    ),
    Scenario(
        "the replica that does not act looks at nothing",
        {**running(), **training(), **looks("0x60", pod=OTHER)},
        silent(20, 60),
        nearly=("AlignmentOperatorNotReconciling",),
    ),
    Scenario(
        "a bug with one run, which is tried every two minutes",
        {**running(), **looks("0+0.5x120", "bug")},
        {5: (), 30: (BUG,)},
    ),
    Scenario(
        "a bug that shows twice and is over",
        {**running(), **looks("0x10 1 2x60", "bug")},
        silent(12, 20, 40),
        nearly=("AlignmentOperatorReconcileErrors",),
    ),
    Scenario(
        "conflicts, because someone edits runs all the time",
        {**running(), **looks("0+2x120", "conflict")},
        silent(12, 60),
        nearly=("AlignmentOperatorReconcileErrors", "AlignmentOperatorApiErrors"),
    ),
)

API = (
    Scenario(
        "a watch dies, and the kubelet restarts the replica",
        {**operator("watch_dead", "0x10 1x1 stale", WATCH), **operator("watch_dead", "_x13 0x60", WATCH, OTHER)},
        {9: (), 12: (DEAD,), 20: (DEAD,), 40: ()},
    ),
    Scenario(
        "watches without any event, because nothing changes",
        {**operator("watch_dead", "0x300", WATCH), **operator("watch_events_total", "7x300", WATCH)},
        silent(30, 300),
        nearly=("AlignmentOperatorWatchDead",),
    ),
    Scenario(
        "the replica is replaced; the watches of both live",
        {**operator("watch_dead", "0x10 stale", WATCH), **operator("watch_dead", "_x11 0x60", WATCH, OTHER)},
        silent(9, 10, 12, 60),
        nearly=("AlignmentOperatorWatchDead",),
    ),
    Scenario(
        "the right to create jobs is missing",
        {**running(), **calls("403", "0+1x120")},
        {5: (), 30: (errors("100%"),)},
    ),
    Scenario(
        "every fifth call gets no answer",
        {**running(), **calls("error", "0+1x120"), **calls("201", "0+4x120")},
        {30: (errors("20%"),)},
    ),
    Scenario(
        "three refusals by a webhook that is restarted",
        {**running(), **calls("500", "0x10 1 2 3x120")},
        silent(12, 20, 60),
        nearly=("AlignmentOperatorApiErrors",),
    ),
    Scenario(
        "jobs that exist already and runs that are gone are no errors",
        {**running(), **calls("409", "0+4x120"), **calls("404", "0+4x120")},
        silent(30, 119),
        nearly=("AlignmentOperatorApiErrors",),
    ),
)

SCENARIOS = (*REPLICAS, *LOOKS, *API)

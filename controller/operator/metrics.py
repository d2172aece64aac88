"""What the operator measures of itself and of the runs it looks after: the one table of names."""

from trainers.metrics import MetricDef

PREFIX = "alignment_operator_"
RUN_STATES = ("Waiting", "Queued", "Running", "Suspended", "Stalled", "Succeeded", "Failed")
LONG = (1.0, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0, 1200.0, 1800.0, 3600.0, 7200.0, 14400.0, 28800.0, 57600.0, 86400.0,
        172800.0, 345600.0)  # fmt: skip
"""Buckets for what takes seconds to days."""
SHORT = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)

RUN = ("namespace", "run")
PHASE = (*RUN, "phase", "type")

RUN_METRICS: tuple[MetricDef, ...] = (
    MetricDef(PREFIX + "run_info", "gauge", "1; what belongs to a run.", (*RUN, "uid", "queue")),
    MetricDef(PREFIX + "run_state", "gauge", "1 for the state that the run is in; other states have no series.", (*RUN, "state")),
    MetricDef(PREFIX + "run_created_timestamp_seconds", "gauge", "Unix time at which the run was made.", RUN),
    MetricDef(PREFIX + "run_start_timestamp_seconds", "gauge", "Unix time at which its work began.", RUN),
    MetricDef(PREFIX + "run_end_timestamp_seconds", "gauge", "Unix time at which it ended.", RUN),
    MetricDef(PREFIX + "run_progress_ratio", "gauge", "Share of the run that is done, 0 to 1; phases count alike.", RUN),
    MetricDef(PREFIX + "phase_state", "gauge", "1 for the state that the phase is in; other states have no series.", (*PHASE, "state")),
    MetricDef(PREFIX + "phase_start_timestamp_seconds", "gauge", "Unix time at which the phase first ran.", PHASE),
    MetricDef(PREFIX + "phase_end_timestamp_seconds", "gauge", "Unix time at which it ended.", PHASE),
    MetricDef(PREFIX + "phase_attempts", "gauge", "Attempts that have begun, and one that is yet to.", PHASE),
    MetricDef(PREFIX + "phase_gpus", "gauge", "GPUs of the attempt that runs; 0 when none runs.", PHASE),
    MetricDef(PREFIX + "phase_retries_used", "gauge", "Failed attempts of a class; only of classes that the phase has met.", (*PHASE, "class")),
    MetricDef(PREFIX + "phase_retries_allowed", "gauge", "Retries that the run allows for that class.", (*PHASE, "class")),
    MetricDef(PREFIX + "phase_result", "gauge", "A final metric of a finished phase, as in the run's status; of the newest runs, up to 20,000 figures.", (*PHASE, "metric")),
)  # fmt: skip
"""Of each run. Only the replica that acts has these, and only while the run exists; of those that have ended, of the newest 1,000."""

METRICS: tuple[MetricDef, ...] = (
    MetricDef(PREFIX + "info", "gauge", "1; the version of this replica.", ("version",)),
    # -- runs together
    MetricDef(PREFIX + "runs", "gauge", "Runs by state.", ("namespace", "state")),
    MetricDef(PREFIX + "phase_duration_seconds", "histogram", "First start of a phase to its end.", ("type", "outcome"), LONG),
    MetricDef(PREFIX + "phase_transitions_total", "counter", "Phases that came into a state.", ("type", "state")),
    MetricDef(PREFIX + "attempt_failures_total", "counter", "Attempts that failed, by class of failure.", ("type", "class")),
    MetricDef(PREFIX + "attempt_wait_seconds", "histogram", "From asking for an attempt until its queue lets it start; 0 without a queue.", ("type",), LONG),
    MetricDef(PREFIX + "retries_total", "counter", "Further attempts, by the class of failure before.", ("type", "class")),
    MetricDef(PREFIX + "gpu_seconds_total", "counter", "GPUs times seconds of the attempts that have ended.", ("namespace", "type", "outcome")),
    *RUN_METRICS,
    # -- the operator itself
    MetricDef(PREFIX + "reconcile_seconds", "histogram", "Duration of one look at a run.", ("outcome",), SHORT),
    MetricDef(PREFIX + "workqueue_wait_seconds", "histogram", "From the wish for a look at a run to its begin.", (), SHORT),
    MetricDef(PREFIX + "workqueue_depth", "gauge", "Runs that wait for a look; 0 in a replica that stands by."),
    MetricDef(PREFIX + "api_requests_total", "counter", "Calls to the API server.", ("verb", "resource", "code")),
    MetricDef(PREFIX + "api_request_seconds", "histogram", "Duration of calls to the API server.", ("verb", "resource"), SHORT),
    MetricDef(PREFIX + "clock_ahead_seconds", "gauge", "Seconds that this replica's clock is ahead of the API server's; beyond 5, the API server's is taken instead."),
    MetricDef(PREFIX + "scrapes_total", "counter", "Pods asked how far they are: progress, empty (no step yet, or no trainer), failed.", ("outcome",)),
    MetricDef(PREFIX + "leader", "gauge", "1 in the replica that acts."),
    MetricDef(PREFIX + "watch_events_total", "counter", "Events seen by the watches.", ("resource",)),
    MetricDef(PREFIX + "watch_dead", "gauge", "1 for a watch that delivers nothing although objects change.", ("resource",)),
)  # fmt: skip

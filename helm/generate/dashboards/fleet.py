"""*Fleet*: all runs of a cluster, what they use, what fails, and the operator itself."""

from controller.api.status import PhaseState
from controller.operator.metrics import RUN_STATES
from generate.dashboards.board import FLEET, RUN, address, annotation, choice, dashboard, text_box, variable
from generate.dashboards.panels import (
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    RED,
    YELLOW,
    bars,
    columns,
    lines,
    link,
    override,
    stat,
    steps,
    table,
    timeline,
    transform,
)
from generate.dashboards.query import (
    Object,
    counts,
    gpu_hours,
    gpus_at_work,
    increase,
    line,
    now,
    operator,
    quantile,
    rate,
    rows,
    trainer,
)
from generate.dashboards.states import COLORS, RUN_TEXTS, colored

LIMIT = 100
"""Rows of the table of runs."""
TOP = 10
"""Namespaces that are lines of their own."""
COARSE = 200
"""Points over the time range where thousands of series are looked at for each."""
NAMESPACE = 'namespace=~"$namespace"'
RUNS = f'{NAMESPACE}, run=~".*${{search:regex}}.*"'


def board() -> Object:
    return dashboard(
        FLEET,
        "Alignment / Fleet",
        "All alignment runs: states, failures, queues, GPUs, and the operator's health.",
        variables=[
            variable(
                "namespace", "Namespace", f"label_values({operator('runs')}, namespace)", many=True, every=True,
                hint="Namespaces of runs.",
            ),
            choice("state", "State", RUN_STATES, "States that the table of runs shows."),
            text_box("search", "Run", "Part of a run's name, for the table of runs."),
        ],
        annotations=[_failed_runs(), _new_leader()],
        links=[],
        start="6h",
        sections=[
            ("Now", [*_now()]),
            ("Runs", [_runs(), _states(), _phases()]),
            ("Phases and failures", [_durations(), _failures(), _retries(), _transitions()]),
            ("GPUs and queues", [*_gpus(), *_queues()]),
            ("Operator", _operator()),
        ],
    )  # fmt: skip


# -- now


def _now() -> list[Object]:
    runs = f"sum by (state) (max by (namespace, state) ({operator('runs', NAMESPACE)}))"
    return [
        stat(
            "Runs by state", "Runs that exist now, by state.", now(runs, "{{state}}"), width=12,
            overrides=colored(RUN_STATES), noValue="No runs",
        ),
        stat(
            "Succeeded of ended", "Runs that succeeded, of those that exist and have ended.",
            now(_success_share(), ""), unit="percentunit", noValue="None has ended",
            thresholds=steps((None, RED), (0.5, ORANGE), (0.9, GREEN)),
        ),
        stat(
            "GPUs at work", "GPUs of attempts that run now.",
            now(f"sum({gpus_at_work(operator('phase_gpus', NAMESPACE))})", ""),
            thresholds=steps((None, BLUE)), noValue="0",
        ),
        stat(
            "GPU hours", "GPUs at work, added up over the time range.",
            now(f"sum({gpu_hours(operator('phase_gpus', NAMESPACE), 'namespace')})", ""),
            unit="h", decimals=1, thresholds=steps((None, BLUE)), noValue="0",
        ),
        stat(
            "Acting operator", "Replicas that hold the Lease, of each installation. One is right; none means that nothing is "
            "looked after.",
            now(f"sum by (namespace) (max by (namespace, pod) ({operator('leader')}))", "{{namespace}}"),
            thresholds=steps((None, RED), (1, GREEN), (2, RED)), noValue="None is scraped",
        ),
    ]  # fmt: skip


def _success_share() -> str:
    def count(states: str) -> str:
        runs = operator("runs", f'{NAMESPACE}, state=~"{states}"')
        return f"sum(max by (namespace, state) ({runs}))"

    return f"{count('Succeeded')} / ({count('Succeeded|Failed')} > 0)"


# -- runs


def _runs() -> Object:
    """Joined by namespace and run; the newest, so that a thousand runs stay readable."""

    def of(expr: str) -> Object:
        return rows(f"({expr}) and on (namespace, run) {newest}")

    by_run = "by (namespace, run)"
    chosen = operator("run_state", f'{RUNS}, state=~"$state"')
    newest = f"topk({LIMIT}, max {by_run} ({operator('run_created_timestamp_seconds', RUNS)}) and on (namespace, run) {chosen})"
    start, end = (operator(f"run_{which}_timestamp_seconds", RUNS) for which in ("start", "end"))
    begun = f"max {by_run} ({start})"
    ended = f"(max {by_run} ({end}) or {begun} * 0 + time())"
    links = [link("Open the run", run_address("${__data.fields.Namespace}", "${__data.fields.Run}"))]
    return table(
        f"Runs (the newest {LIMIT})",
        f"The newest {LIMIT} runs that fit the choices above. A click on a name opens the run.",
        of(f"max by (namespace, run, state) ({chosen})"),
        of(f"max {by_run} ({operator('run_progress_ratio', RUNS)})"),
        of(f"max {by_run} ({operator('run_created_timestamp_seconds', RUNS)}) * 1000"),
        of(f"{ended} - {begun}"),
        of(f"sum {by_run} ({gpus_at_work(operator('phase_gpus', RUNS))})"),
        of(f"sum {by_run} (max by (namespace, run, phase, class) ({operator('phase_retries_used', RUNS)}))"),
        of(f"max by (namespace, run, queue) ({operator('run_info', RUNS)})"),
        transformations=columns(
            [
                ("namespace", "Namespace"), ("run", "Run"), ("state", "State"), ("Value #B", "Progress"),
                ("Value #C", "Created"), ("Value #D", "Duration"), ("Value #E", "GPUs"), ("Value #F", "Failed attempts"),
                ("queue", "Queue"),
            ],
            also=["Value #A", "Value #G"],
        ),
        overrides=[
            override("Run", links=links),
            override("State", mappings=RUN_TEXTS, **{"custom.cellOptions": {"type": "color-text"}}),
            override("Progress", unit="percentunit", min=0, max=1, color={"mode": "fixed", "fixedColor": BLUE},
                     **{"custom.cellOptions": {"type": "gauge", "mode": "basic"}}),
            override("Created", unit="dateTimeFromNow"),
            override("Duration", unit="s"),
            override("Failed attempts", noValue="0", thresholds=steps((None, GREY), (1, ORANGE)),
                     **{"custom.cellOptions": {"type": "color-text"}}),
        ],
        height=10,
        sort=("Created", True),
        noValue="No run fits the choices above",
    )  # fmt: skip


def run_address(namespace: str, run: str) -> str:
    return address(RUN, f"var-namespace={namespace}&var-run={run}&${{__url_time_range}}")


def _states() -> Object:
    expr = f"sum by (state) (max by (namespace, state) ({operator('runs', NAMESPACE)}))"
    return lines(
        "Runs over time", "Runs that exist, by state.", line(expr, "{{state}}"), width=12, stacked=True, min=0,
        overrides=colored(RUN_STATES), noValue="No runs",
    )  # fmt: skip


def _phases() -> Object:
    running = operator("phase_state", f'{NAMESPACE}, state="Running"')
    expr = f"count by (type) (max by (namespace, run, phase, type) ({running}))"
    return lines(
        "Running phases", "Phases that run, by type.", line(expr, "{{type}}"), width=12, stacked=True, min=0, points=COARSE,
        noValue="No phase runs",
    )  # fmt: skip


# -- phases and failures


def _durations() -> Object:
    buckets = operator("phase_duration_seconds_bucket")
    count = operator("phase_duration_seconds_count")
    return table(
        "Phase durations",
        "Phases that ended within the time range: how many, and how long half and 95 % of them took at most, from the "
        "first start to the end, by type and outcome. Estimated from buckets; of all namespaces.",
        rows(f"round({increase(count, 'type, outcome')}) > 0"),
        rows(_by_outcome(0.5, buckets)),
        rows(_by_outcome(0.95, buckets)),
        transformations=columns([
            ("type", "Type"), ("outcome", "Outcome"), ("Value #A", "Phases"), ("Value #B", "Median"), ("Value #C", "95 %"),
        ]),
        overrides=[
            override("Median", unit="s"),
            override("95 %", unit="s"),
            override("Outcome", mappings=RUN_TEXTS, **{"custom.cellOptions": {"type": "color-text"}}),
        ],
        width=12,
        sort=("Type", False),
        noValue="No phase has ended",
    )  # fmt: skip


def _by_outcome(q: float, buckets: str) -> str:
    return f"{quantile(q, buckets, 'type, outcome', '$__range')} >= 0"


def _failures() -> Object:
    expr = increase(operator("attempt_failures_total"), "class, type")
    return bars(
        "Failed attempts by class", "Attempts that failed within the time range, by class of failure and type of phase; "
        "the 15 most frequent, of all namespaces.",
        now(f"topk(15, round({expr}) > 0)", "{{class}} · {{type}}"),
        width=12, decimals=0, min=0, thresholds=steps((None, ORANGE)), noValue="No attempt has failed",
    )  # fmt: skip


def _retries() -> Object:
    return lines(
        "Failures and retries", "Attempts that failed and attempts that followed one, by class of failure, in the time "
        "around each point.",
        line(f"{counts(operator('attempt_failures_total'), 'class')} > 0", "failed: {{class}}"),
        line(f"{counts(operator('retries_total'), 'class')} > 0", "tried again: {{class}}"),
        width=12, min=0, calcs=("max",), bars=True, noValue="No attempt has failed",
    )  # fmt: skip


def _transitions() -> Object:
    return lines(
        "Phases' changes of state", "Phases that came into a state in the time around each point.",
        line(f"{counts(operator('phase_transitions_total'), 'state')}", "{{state}}"),
        width=12, min=0, calcs=("max",), overrides=colored(PhaseState), noValue="No phase has changed its state",
    )  # fmt: skip


# -- GPUs and queues


def _gpus() -> list[Object]:
    gpus = operator("phase_gpus", NAMESPACE)
    by_namespace = f"sum by (namespace) ({gpus_at_work(gpus)})"
    ended = f"{increase(operator('gpu_seconds_total', NAMESPACE), 'namespace, outcome')} / 3600"
    busy = trainer("gpu_utilization_ratio", NAMESPACE)
    return [
        lines(
            f"GPUs at work (top {TOP} namespaces)", f"GPUs of attempts that run, of the {TOP} namespaces with the most.",
            line(f"topk({TOP}, {by_namespace})", "{{namespace}}"),
            points=COARSE, stacked=True, min=0, noValue="No GPU is at work",
        ),
        bars(
            f"GPU hours (top {TOP} namespaces)",
            f"GPUs at work, added up over the time range, of the {TOP} namespaces with the most. What still runs counts too.",
            now(f"topk({TOP}, {gpu_hours(gpus, 'namespace')} > 0)", "{{namespace}}"),
            unit="h", decimals=1, min=0, thresholds=steps((None, BLUE)), noValue="No GPU was at work",
        ),
        bars(
            "GPU hours of ended attempts",
            "By outcome: what failed attempts have cost. "
            "The 10 most, by namespace. Of attempts that ended within the time range.",
            now(f"topk(10, {ended} > 0)", "{{namespace}} · {{outcome}}"),
            unit="h", decimals=1, min=0, thresholds=steps((None, BLUE)), noValue="No attempt with GPUs has ended",
        ),
        lines(
            "GPU utilisation", "Share of the time in which GPUs compute, mean and the idlest, as trainers read it (NVML).",
            line(f"avg({busy})", "mean"), line(f"min({busy})", "idlest"), unit="percentunit", min=0, max=1,
            noValue="No GPU is at work",
        ),
        lines(
            "GPU power", "Power that the trainers' GPUs draw together (NVML).",
            line(f"sum({trainer('gpu_power_watts', NAMESPACE)})", "all GPUs"), unit="watt", min=0,
            noValue="No GPU is at work",
        ),
        lines(
            f"Tokens per second (top {TOP} namespaces)",
            f"Tokens that trainers process, padding not counted, of the {TOP} namespaces with the most.",
            line(f"topk({TOP}, {rate(trainer('tokens_total', NAMESPACE), 'namespace')})", "{{namespace}}"), min=0,
            noValue="No trainer is at work",
        ),
    ]  # fmt: skip


def _queues() -> list[Object]:
    wait = operator("attempt_wait_seconds_bucket")
    queued = operator("run_state", f'{NAMESPACE}, state="Queued"')
    waiting = f"{operator('run_info', NAMESPACE)} and on (namespace, run) {queued}"
    by_queue = f"count by (namespace, queue) (max by (namespace, run, queue) ({waiting}))"
    return [
        lines(
            "Wait for a start", "From asking for an attempt until it may start; half and 95 % waited at most this long. "
            "Estimated from buckets, over the last hour at each point.",
            line(quantile(0.5, wait, window="1h"), "median"), line(quantile(0.95, wait, window="1h"), "95 %"),
            width=12, unit="s", min=0, noValue="No attempt was asked for",
        ),
        lines(
            f"Queued runs (top {TOP} queues)", f"Runs that wait for their queue, of the {TOP} queues with the most.",
            line(f"topk({TOP}, {by_queue})", "{{namespace}} · {{queue}}"), width=12, stacked=True, min=0, decimals=0,
            points=COARSE,
            noValue="No run is queued",
        ),
    ]  # fmt: skip


# -- the operator


def _operator() -> list[Object]:
    look, wait = operator("reconcile_seconds"), operator("workqueue_wait_seconds_bucket")
    leader = f"max by (pod) ({operator('leader')})"
    roles = [
        {"type": "value", "options": {"1": {"text": "acts", "color": GREEN, "index": 0}}},
        {"type": "value", "options": {"0": {"text": "stands by", "color": COLORS["Waiting"], "index": 1}}},
    ]
    return [
        timeline("Replicas", "Which replica holds the Lease.", line(leader, "{{pod}}"), roles, height=5),
        lines(
            "Reconcile duration", "How long a look at a run takes: half, 95 % and 99 % of them at most.",
            *(line(quantile(q, f"{look}_bucket"), f"{q:.0%}".replace("%", " %")) for q in (0.5, 0.95, 0.99)),
            unit="s", min=0, noValue="The operator is not scraped",
        ),
        lines(
            "Reconciles per second", "Looks at runs, by outcome.", line(rate(f"{look}_count", "outcome"), "{{outcome}}"),
            unit="ops", min=0, stacked=True, noValue="The operator is not scraped",
        ),
        lines(
            "Work queue", "Runs that wait for a look, and how long half and 95 % of them waited at most.",
            line(f"max({operator('workqueue_depth')})", "runs waiting"),
            line(quantile(0.5, wait), "wait, median"), line(quantile(0.95, wait), "wait, 95 %"),
            unit="s", min=0, noValue="The operator is not scraped",
            overrides=[override("runs waiting", unit="short", **{"custom.axisPlacement": "right"})],
        ),
        lines(
            "Calls to the API server", "By answer; codes from 400 on are refusals, 409 is a conflict that is tried again.",
            line(rate(operator("api_requests_total"), "code"), "{{code}}"), unit="reqps", min=0,
            noValue="The operator is not scraped",
        ),
        lines(
            "Slowest calls (top 10 resources)",
            "95 % of the calls to the API server took at most this long, by verb and resource.",
            line(f"topk(10, {quantile(0.95, operator('api_request_seconds_bucket'), 'verb, resource')} >= 0)",
                 "{{verb}} {{resource}}"),
            unit="s", min=0, noValue="The operator is not scraped",
        ),
        lines(
            "Watch events", "Changes that the watches deliver, by resource.",
            line(rate(operator("watch_events_total"), "resource"), "{{resource}}"), unit="ops", min=0,
            noValue="The operator is not scraped",
        ),
        lines(
            "Progress of pods",
            "Pods that are asked how far they are. Empty: no step yet, or no trainer. Failed: no answer that is read.",
            line(rate(operator("scrapes_total"), "outcome"), "{{outcome}}"), unit="ops", min=0, stacked=True,
            noValue="The operator is not scraped",
        ),
        stat(
            "Dead watches", "Watches that deliver nothing although objects change. 0 is right.",
            now(f"sum(max by (resource) ({operator('watch_dead')}))", ""), width=4,
            thresholds=steps((None, GREEN), (1, RED)), noValue="None is scraped",
        ),
        stat(
            "Clocks", "Seconds that the worst replica's clock is off the API server's. Beyond 5 the API server's is taken.",
            now(f"max(abs({operator('clock_ahead_seconds')}))", ""), width=4, unit="s", decimals=0,
            thresholds=steps((None, GREEN), (5, YELLOW)), noValue="None is scraped",
        ),
        table(
            "Versions", "Versions of the replicas.", rows(f"count by (version, pod) ({operator('info')})"),
            transformations=[transform(
                "organize", indexByName={"pod": 0, "version": 1}, excludeByName={"Time": True, "Value": True},
                renameByName={"pod": "Pod", "version": "Version"},
            )],
            width=16, height=4, noValue="None is scraped",
        ),
    ]  # fmt: skip


# -- annotations


def _failed_runs() -> Object:
    failed = operator("run_state", f'{NAMESPACE}, state="Failed"')
    ended = f"max by (namespace, run) ({operator('run_end_timestamp_seconds', NAMESPACE)})"
    expr = f"topk(50, {ended} and on (namespace, run) {failed}) * 1000"
    return annotation("Failed runs (newest 50)", expr, "{{namespace}}/{{run}} failed", RED, at_value=True)


def _new_leader() -> Object:
    leader = operator("leader")
    expr = f"max by (pod) ({leader}) == 1 unless max by (pod) ({leader} offset 30s) == 1"
    return annotation("Change of the acting replica", expr, "{{pod}} acts now", YELLOW)

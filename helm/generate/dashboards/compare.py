"""*Compare*: several runs side by side. Training is drawn over progress, so that runs need not have run at one time."""

from generate.dashboards.board import COMPARE, FLEET, annotation, dashboard, link_to, variable
from generate.dashboards.fleet import run_address
from generate.dashboards.panels import (
    BLUE,
    BY_NAME,
    GREEN,
    GREY,
    ORANGE,
    RED,
    bars,
    columns,
    lines,
    link,
    matrix,
    override,
    steps,
    table,
    trend,
)
from generate.dashboards.query import (
    Object,
    gpu_hours,
    latest,
    line,
    now,
    operator,
    over_progress,
    rate,
    rows,
    trainer,
)
from generate.dashboards.states import RUN_TEXTS

RUNS = 'namespace=~"$namespace", run=~"$run"'
PHASE = f'{RUNS}, phase="$phase"'
SAID = f'{PHASE}, rank="0"'
BY_RUN = "by (namespace, run)"
NAME = "{{namespace}}/{{run}}"
NO_TRAINER = "No trainer of these runs' phase was scraped in this time"


def board() -> Object:
    return dashboard(
        COMPARE,
        "Alignment / Compare",
        "Several alignment runs side by side: training over progress, cost, and results. "
        "Choose a time range in which all of them have run.",
        variables=[
            variable(
                "namespace", "Namespace", f"label_values({operator('run_state')}, namespace)", many=True, every=True
            ),
            variable(
                "run", "Runs", f"label_values({operator('run_state', IN_NAMESPACES)}, run)", many=True,
                hint="Two to ten stay readable.",
            ),
            variable(
                "phase", "Phase", f"label_values({operator('phase_state', RUNS)}, phase)",
                hint="The phase whose training is compared.",
            ),
            variable(
                "model", "Models", f"label_values({operator('phase_result', RUNS)}, metric)", many=True, every=True,
                regex="/^([^/]+)\\/.+/", hint="Models whose evaluation is compared.",
            ),
        ],
        annotations=_annotations(),
        links=[link_to(FLEET, "Fleet")],
        start="24h",
        sections=[
            ("Runs", [_runs()]),
            ("Training of ${phase}, over its progress", _training()),
            ("Speed of ${phase}", _speed()),
            ("Results", _results()),
            ("Cost", _cost()),
        ],
    )  # fmt: skip


IN_NAMESPACES = 'namespace=~"$namespace"'


# -- runs


def _runs() -> Object:
    start, end = (operator(f"run_{which}_timestamp_seconds", RUNS) for which in ("start", "end"))
    begun = f"max {BY_RUN} ({start})"
    return table(
        "Runs",
        "State, progress and cost of each. GPU hours and tokens within the time range. A click on a name opens the run.",
        rows(f"max by (namespace, run, state) ({operator('run_state', RUNS)})"),
        rows(f"max {BY_RUN} ({operator('run_progress_ratio', RUNS)})"),
        rows(f"{begun} * 1000"),
        rows(f"(max {BY_RUN} ({end}) or {begun} * 0 + time()) - {begun}"),
        rows(gpu_hours(operator("phase_gpus", RUNS), "namespace, run")),
        rows(f"sum {BY_RUN} (increase({trainer('tokens_total', RUNS)}[$__range]))"),
        rows(f"sum {BY_RUN} ({_RETRIES_USED})"),
        transformations=columns(
            [
                ("namespace", "Namespace"), ("run", "Run"), ("state", "State"), ("Value #B", "Progress"),
                ("Value #C", "Began"), ("Value #D", "Duration"), ("Value #E", "GPU hours"), ("Value #F", "Tokens"),
                ("Value #G", "Failed attempts"),
            ],
            also=["Value #A"],
        ),
        overrides=[
            override("Run", links=[link("Open the run", run_address("${__data.fields.Namespace}", "${__data.fields.Run}"))]),
            override("State", mappings=RUN_TEXTS, **{"custom.cellOptions": {"type": "color-text"}}),
            override("Progress", unit="percentunit", min=0, max=1, color={"mode": "fixed", "fixedColor": BLUE},
                     **{"custom.cellOptions": {"type": "gauge", "mode": "basic"}}),
            override("Began", unit="dateTimeAsIso"),
            override("Duration", unit="s"),
            override("GPU hours", decimals=2),
            override("Failed attempts", noValue="0", thresholds=steps((None, GREY), (1, ORANGE)),
                     **{"custom.cellOptions": {"type": "color-text"}}),
        ],
        height=7,
        sort=("Began", False),
        noValue="No run is chosen",
    )  # fmt: skip


# -- training


def _training() -> list[Object]:
    def over(title: str, description: str, name: str, no_value: str = NO_TRAINER, unit: str = "short") -> Object:
        value = f"max {BY_RUN} ({trainer(name, SAID)})"
        progress = f"max {BY_RUN} ({trainer('progress_ratio', SAID)})"
        text = f"{description} Means over 5 % of the phase."
        return trend(title, text, rows(over_progress(value, progress)), "progress", noValue=no_value, unit=unit)

    other_type = "Phases of this type do not measure it, or none was scraped"
    return [
        over("Loss", "Training loss.", "loss"),
        over("Loss on held-out data", "sft, reward and dpo.", "eval_loss", no_value=other_type),
        over("Gradient norm", "Before clipping.", "grad_norm"),
        over("Reward", "ppo, rollout and distill.", "reward", no_value=other_type),
        over("KL divergence", "Per token, from the reference (ppo) or the teacher (distill).", "kl_nats",
             unit="suffix:nats", no_value=other_type),
        over("Response length", "ppo, rollout and distill.", "response_length_tokens",
             unit="suffix:tokens", no_value=other_type),
        over("Pairs ranked right", "reward and dpo.", "accuracy_ratio", unit="percentunit", no_value=other_type),
        over("Held-out pairs ranked right", "reward and dpo.", "eval_accuracy_ratio", unit="percentunit", no_value=other_type),
        over("Reward margin", "reward and dpo.", "reward_margin", no_value=other_type),
    ]  # fmt: skip


def _speed() -> list[Object]:
    flops = rate(trainer("model_flops_total", PHASE), "namespace, run")
    peak = f"sum {BY_RUN} ({trainer('peak_flops_per_second', PHASE)})"
    return [
        lines(
            "Tokens per second", "Of all processes; padding not counted. At the time of day.",
            line(f"sum {BY_RUN} ({trainer('tokens_per_second', PHASE)})", NAME), min=0, color=BY_NAME, noValue=NO_TRAINER,
        ),
        lines(
            "Model FLOPs utilisation (MFU)", "Operations that the model needs, of those that the devices could do.",
            line(f"{flops} / {peak}", NAME), unit="percentunit", min=0, color=BY_NAME,
            noValue="The devices' peak is not known (CPU)",
        ),
        lines(
            "GPU utilisation", "Share of the time in which the GPUs compute (NVML).",
            line(f"avg {BY_RUN} ({trainer('gpu_utilization_ratio', PHASE)})", NAME), unit="percentunit", min=0, max=1,
            color=BY_NAME, noValue="No trainer with a GPU was scraped",
        ),
    ]  # fmt: skip


# -- results


def _results() -> list[Object]:
    return [
        bars(
            "Win rate against the run's baseline", "Share of prompts on which the reward model prefers the model's response "
            "to that of the run's own baseline. 50 % is a draw. The 40 highest.",
            now(f"topk(40, max by (namespace, run, model) ({_with_model(_evaluated('.+/winRate'))}))", "{{run}} · {{model}}"),
            unit="percentunit", min=0, max=1, thresholds=steps((None, ORANGE), (0.5, GREEN)), height=14,
            noValue="Not evaluated yet",
        ),
        matrix(
            "Evaluation", "Figures of the chosen models, `<model>/<benchmark>/<metric>`, a column per run. Only what is "
            "measured on the same data can be compared.",
            rows(f"max by (who, metric) ({_named(_evaluated('.+/.+'))})"), column="who", row="metric", width=16, height=14,
            decimals=3, noValue="Not evaluated yet",
        ),
        matrix(
            "Final figures of ${phase}", "What the phase says of itself at its end, a column per run.",
            rows(f"max by (who, metric) ({_named(operator('phase_result', _OWN))})"), column="who", row="metric", width=12,
            decimals=3, noValue="The phase has not ended",
        ),
        matrix(
            "Final training loss", "The last value within the time range, phases down, runs across. Losses are comparable "
            "within a row.",
            rows(_named(latest("loss", _ALL_PHASES, "namespace, run, phase"))), column="who", row="phase",
            width=12, decimals=3, noValue=NO_TRAINER,
        ),
    ]  # fmt: skip


_RETRIES_USED = f"max by (namespace, run, phase, class) ({operator('phase_retries_used', RUNS)})"
_OWN = f'{PHASE}, metric!~".+/.+"'
_ALL_PHASES = f'{RUNS}, rank="0"'


def _evaluated(rest: str) -> str:
    return operator("phase_result", f'{RUNS}, metric=~"$model/{rest}"')


def _with_model(expr: str) -> str:
    return f'label_replace({expr}, "model", "$1", "metric", "([^/]+)/.+")'


def _named(expr: str) -> str:
    """With a label ``who``: namespace and run, which together name one."""
    return f'label_join({expr}, "who", "/", "namespace", "run")'


# -- cost


def _cost() -> list[Object]:
    by_phase = "by (namespace, run, phase)"
    start, end = (operator(f"phase_{which}_timestamp_seconds", RUNS) for which in ("start", "end"))
    spans = f"max {by_phase} ({end}) - max {by_phase} ({start})"
    return [
        matrix(
            "Duration of the phases", "From the first start to the end of phases that have ended, a column per run.",
            rows(_named(spans)), column="who", row="phase", unit="s", height=10, noValue="No phase has ended",
        ),
        bars(
            "GPU hours", "GPUs at work, added up over the time range. The 20 largest.",
            now(f"topk(20, {gpu_hours(operator('phase_gpus', RUNS), 'namespace, run')} > 0)", NAME), unit="h", decimals=2, min=0,
            thresholds=steps((None, BLUE)), width=12, height=6, noValue="No GPU was at work",
        ),
        bars(
            "Failed attempts", "That count against the retries, by class. The 20 most frequent.",
            now(f"topk(20, sum by (namespace, run, class) ({_RETRIES_USED}))", "{{run}} · {{class}}"),
            min=0, decimals=0, thresholds=steps((None, ORANGE)), width=12, height=6, noValue="No attempt has failed",
        ),
    ]  # fmt: skip


# -- annotations


def _annotations() -> list[Object]:
    def at(which: str) -> str:
        return f"max {BY_RUN} ({operator(f'run_{which}_timestamp_seconds', RUNS)}) * 1000"

    return [
        annotation("Runs begin", at("start"), "{{run}} begins", BLUE, at_value=True),
        annotation("Runs end", at("end"), "{{run}} ends", RED, at_value=True),
    ]

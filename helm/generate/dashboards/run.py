"""*Run*: one run, from its phases' states to the figures of its models."""

from generate.dashboards.board import COMPARE, FLEET, RUN, annotation, dashboard, link_to, variable
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
    matrix,
    override,
    stat,
    steps,
    table,
    timeline,
    transform,
)
from generate.dashboards.query import (
    Object,
    gpu_hours,
    latest,
    line,
    now,
    operator,
    quantile,
    rate,
    rows,
    trainer,
)
from generate.dashboards.states import PHASE_NUMBERS, PHASE_TEXTS, RUN_NUMBERS, numbered, state_of

IN_NAMESPACE = 'namespace="$namespace"'
ONE = 'namespace="$namespace", run="$run"'
PHASES = f'{ONE}, phase=~"$phase"'
FIRST_RANK = f'{ONE}, rank="0"'
SAID = f'{PHASES}, rank="0"'
"""What training says is the same on every rank."""
NOT_RUNNING = "No trainer of this run was scraped in this time"


def board() -> Object:
    return dashboard(
        RUN,
        "Alignment / Run",
        "One alignment run: its phases, how training goes, what it uses, and what its models can do.",
        variables=[
            variable("namespace", "Namespace", f"label_values({operator('run_state')}, namespace)"),
            variable("run", "Run", f"label_values({operator('run_state', IN_NAMESPACE)}, run)"),
            variable(
                "phase", "Phase", f"label_values({operator('phase_state', ONE)}, phase)", many=True, every=True,
                hint="Phases whose training is shown.",
            ),
        ],
        annotations=_annotations(),
        links=[
            link_to(FLEET, "Fleet"),
            link_to(COMPARE, "Compare with other runs", "${namespace:queryparam}&${run:queryparam}"),
        ],
        start="6h",
        sections=[
            ("Run", _summary()),
            ("Phases", [_timeline(), _phases()]),
            ("Training", _training()),
            ("Preferences and policies", _policies()),
            ("Served teachers", _teachers()),
            ("Speed", _speed()),
            ("Devices and memory", _devices()),
            ("Checkpoints and progress", _checkpoints()),
            ("Teacher against student", _results()),
        ],
    )  # fmt: skip


# -- the run


def _summary() -> list[Object]:
    start, end = operator("run_start_timestamp_seconds", ONE), operator("run_end_timestamp_seconds", ONE)
    retries = f"sum(max by (phase, class) ({operator('phase_retries_used', ONE)}))"
    return [
        stat(
            "State", "State of the run.", now(state_of("run_state", ONE, RUN_NUMBERS, "run"), ""), width=4,
            mappings=numbered(RUN_NUMBERS), noValue="Unknown",
        ),
        stat(
            "Progress", "Share of the run that is done; phases count alike.",
            now(f"max({operator('run_progress_ratio', ONE)})", ""), unit="percentunit", decimals=0,
            thresholds=steps((None, BLUE), (1, GREEN)), noValue="–",
        ),
        stat(
            "Time left", "Estimated time to the end of the phases that run now; what comes after them is not in it.",
            now(f"max({trainer('eta_seconds', FIRST_RANK)})", ""), unit="s", decimals=0, noValue="–",
        ),
        stat(
            "Duration", "From the begin of work to the end, or until now.",
            now(f"(max({end}) or time() + 0 * max({start})) - max({start})", ""), unit="s", decimals=0,
            noValue="Not started",
        ),
        stat(
            "GPU hours", "GPUs at work, added up over the time range.",
            now(f"sum({gpu_hours(operator('phase_gpus', ONE), 'run')})", ""), unit="h", decimals=1, noValue="0",
        ),
        stat(
            "Tokens", "Tokens processed within the time range by trainers, padding not counted.",
            now(f"sum(increase({trainer('tokens_total', ONE)}[$__range]))", ""), unit="short", noValue="–",
        ),
        stat(
            "Failed attempts", "Attempts that failed and count against the run's retries.",
            now(f"{retries} or 0 * max({operator('run_state', ONE)})", ""), width=5,
            thresholds=steps((None, GREEN), (1, ORANGE), (5, RED)), noValue="–",
        ),
    ]  # fmt: skip


# -- phases


def _timeline() -> Object:
    expr = state_of("phase_state", PHASES, PHASE_NUMBERS, "phase")
    return timeline(
        "Phases over time", "The state of each phase.", line(expr, "{{phase}}"), numbered(PHASE_NUMBERS), height=11
    )


def _phases() -> Object:
    by = "by (phase, type)"
    start, end = (operator(f"phase_{which}_timestamp_seconds", PHASES) for which in ("start", "end"))
    ended = f"(max {by} ({end}) or max {by} ({start}) * 0 + time())"
    return table(
        "Phases",
        "Each phase: its state, steps of its newest attempt, when it began and how long it took, attempts that count, "
        "and those of them that failed.",
        rows(f"max by (phase, type, state) ({operator('phase_state', PHASES)})"),
        rows(latest("step", SAID, "phase, type")),
        rows(latest("total_steps", SAID, "phase, type")),
        rows(f"max {by} ({start}) * 1000"),
        rows(f"{ended} - max {by} ({start})"),
        rows(f"max {by} ({operator('phase_attempts', PHASES)})"),
        rows(f"sum {by} (max by (phase, type, class) ({operator('phase_retries_used', PHASES)}))"),
        rows(f"max {by} ({operator('phase_gpus', PHASES)})"),
        transformations=columns(
            [
                ("phase", "Phase"), ("type", "Type"), ("state", "State"), ("Value #B", "Step"), ("Value #C", "Of"),
                ("Value #D", "Began"), ("Value #E", "Duration"), ("Value #F", "Attempts"), ("Value #G", "Failed"),
                ("Value #H", "GPUs"),
            ],
            also=["Value #A"],
        ),
        overrides=[
            override("State", mappings=PHASE_TEXTS, **{"custom.cellOptions": {"type": "color-text"}}),
            *(override(name, **{"custom.width": 90}) for name in ("Step", "Of", "Attempts", "Failed", "GPUs")),
            override("Began", unit="dateTimeAsIso"),
            override("Duration", unit="s"),
            override("Failed", noValue="0", thresholds=steps((None, GREY), (1, ORANGE)),
                     **{"custom.cellOptions": {"type": "color-text"}}),
        ],
        height=11,
        sort=("Began", False),
        noValue="Unknown run",
    )  # fmt: skip


# -- training


def _said(name: str, legend: str = "{{phase}}") -> Object:
    """What rank 0 says; of several attempts at once, which happens for a moment, the one value."""
    return line(f"max by (phase) ({trainer(name, SAID)})", legend)


def _training() -> list[Object]:
    return [
        lines(
            "Loss", "Training loss of the last step. Types of phases have losses of different kinds.", _said("loss"),
            noValue=NOT_RUNNING,
        ),
        lines(
            "Loss on held-out data", "Of phases that have such data (sft, reward, dpo), when it was last looked at.",
            _said("eval_loss"), noValue="No phase with held-out data was scraped",
        ),
        lines(
            "Gradient norm", "Before clipping, logarithmic. A jump by orders of magnitude comes before a divergence.",
            _said("grad_norm"), logarithmic=True, noValue=NOT_RUNNING,
        ),
        lines(
            "Learning rate", "Of the last step.", _said("learning_rate"), unit="sci", decimals=1, noValue=NOT_RUNNING,
        ),
        lines(
            "Pairs ranked right", "Share of the last step's pairs, and of held-out pairs, in which the chosen response "
            "is ranked before the rejected one (reward, dpo). 50 % is chance.",
            _said("accuracy_ratio"), _said("eval_accuracy_ratio", "{{phase}}, held out"), unit="percentunit",
            noValue="No phase of type reward or dpo was scraped",
        ),
        lines(
            "Reward margin", "Mean reward of chosen responses less that of rejected ones (reward, dpo).",
            _said("reward_margin"), noValue="No phase of type reward or dpo was scraped",
        ),
    ]  # fmt: skip


def _policies() -> list[Object]:
    sampled = "No phase that samples responses was scraped"
    corrected = "No phase that corrects its samples was scraped"
    return [
        lines(
            "Reward", "Mean reward of the last step's responses (ppo, rollout, distill).", _said("reward"),
            noValue=sampled,
        ),
        lines(
            "KL divergence", "Per token, from the reference (ppo) or the teacher (distill). "
            "A policy whose reward rises while this runs away exploits the reward model.",
            _said("kl_nats"), unit="suffix:nats", min=0, noValue=sampled,
        ),
        lines(
            "Entropy", "Per sampled token (ppo). Near 0 the policy says the same thing whenever it is asked.",
            _said("entropy_nats"), unit="suffix:nats", min=0,
            noValue="No phase of type ppo was scraped",
        ),
        lines(
            "Response length", "Mean length of sampled responses (ppo, rollout, distill).",
            _said("response_length_tokens"), unit="suffix:tokens", min=0, noValue=sampled,
        ),
        lines(
            "Responses that end by themselves", "Share of sampled responses that end before the limit (ppo, rollout).",
            _said("ended_ratio"), unit="percentunit", min=0, max=1, noValue=sampled,
        ),
        lines(
            "Clipped tokens and effective samples", "Share of tokens whose policy ratio was clipped (ppo); "
            "effective sample size of the reward weights as a share of the samples (distill).",
            _said("clip_ratio", "{{phase}}, clipped"), _said("effective_sample_ratio", "{{phase}}, effective samples"),
            unit="percentunit", min=0, noValue="No phase of type ppo or distill was scraped",
        ),
        lines(
            "Mismatch of sampler and policy", "KL divergence per token between what sampled the responses and the policy "
            "that learns from them (ppo, distill), where they are not the same weights and program.",
            _said("mismatch_nats"), unit="suffix:nats", min=0, noValue=corrected,
        ),
        lines(
            "Importance weights", "Mean weight of sampled tokens, and the share of them whose weight was cut off (ppo, distill). "
            "Far from 1 the samples say little about the policy: a smaller staleness, or a smaller learning rate.",
            _said("importance_weight", "{{phase}}, weight"),
            _said("importance_truncated_ratio", "{{phase}}, cut off"), min=0, noValue=corrected,
        ),
        lines(
            "Staleness", "Steps between the weights that sampled the responses and those that learn from them (ppo, distill).",
            _said("staleness_steps"), unit="suffix:steps", min=0, noValue=corrected,
        ),
    ]  # fmt: skip


# -- served teachers


def _teachers() -> list[Object]:
    answers, retries = trainer("teacher_answer_seconds_bucket", PHASES), trainer("teacher_retries_total", PHASES)
    count, share = trainer("teacher_answer_seconds_count", PHASES), trainer("teacher_loss_ratio", SAID)
    none = "No phase that asks a served teacher was scraped"
    return [
        lines(
            "Answers per second", "Of each served teacher, to all processes of a phase (distill).",
            line(rate(count, "phase, teacher"), "{{phase}}, {{teacher}}"), min=0, noValue=none,
        ),
        lines(
            "Time to an answer", "95 % of a teacher's answers took at most this long, and half of them. Estimated from buckets.",
            line(f"{quantile(0.95, answers, 'phase, teacher')} >= 0", "{{phase}}, {{teacher}}, 95 %"),
            line(f"{quantile(0.5, answers, 'phase, teacher')} >= 0", "{{phase}}, {{teacher}}, half"), unit="s", min=0,
            noValue=none,
        ),
        lines(
            "Asked again", "Questions per second that a teacher had not answered, or had said to wait with.",
            line(rate(retries, "phase, teacher"), "{{phase}}, {{teacher}}"), min=0, noValue=none,
        ),
        lines(
            "Share of the loss", "Of the last step's loss what is of each teacher's rows, where there are several.",
            line(f"max by (phase, teacher) ({share})", "{{phase}}, {{teacher}}"), unit="percentunit", min=0, max=1,
            noValue="No phase with several teachers was scraped",
        ),
    ]  # fmt: skip


# -- speed


def _speed() -> list[Object]:
    tokens, seconds = trainer("tokens_per_second", PHASES), trainer("part_seconds_total", PHASES)
    parts = f"sum by (part) (rate({seconds}[$__rate_interval]))"
    flops = f"sum by (phase) (rate({trainer('model_flops_total', PHASES)}[$__rate_interval]))"
    peak = f"sum by (phase) ({trainer('peak_flops_per_second', PHASES)})"
    steps_of = trainer("step_seconds_bucket", PHASES)
    return [
        lines(
            "Tokens per second", "Of all processes of a phase, over its last steps; padding not counted.",
            line(f"sum by (phase) ({tokens})", "{{phase}}"), min=0, noValue=NOT_RUNNING,
        ),
        lines(
            "Where the time goes", "Share of the measured time that each part of the step takes.",
            line(f"{parts} / ignoring (part) group_left () sum({parts})", "{{part}}"), unit="percentunit", max=1,
            stacked=True, min=0, noValue=NOT_RUNNING,
        ),
        lines(
            "Step duration", "Half of a phase's steps took at most this long; 95 % of the steps of all phases. Estimated from "
            "buckets.",
            line(f"{quantile(0.5, steps_of, 'phase')} >= 0", "{{phase}}"),
            line(f"{quantile(0.95, steps_of)} >= 0", "95 % of all"), unit="s", min=0, noValue=NOT_RUNNING,
        ),
        lines(
            "Model FLOPs utilisation (MFU)", "Operations that the model needs, of those that the devices could do "
            "(dense bf16). Recomputation and padding do not count.",
            line(f"{flops} / {peak}", "{{phase}}"), unit="percentunit", min=0,
            noValue="The devices' peak is not known (CPU)",
        ),
        lines(
            "Model FLOPs per second", "Operations per second that the model needs for the tokens processed.",
            line(flops, "{{phase}}"), unit="flops", min=0, noValue=NOT_RUNNING,
        ),
        lines(
            "Examples per second", "Of all processes of a phase.",
            line(rate(trainer("samples_total", PHASES), "phase"), "{{phase}}"), min=0,
            noValue=NOT_RUNNING,
        ),
    ]  # fmt: skip


def _devices() -> list[Object]:
    used, total = trainer("gpu_memory_used_bytes", PHASES), trainer("gpu_memory_total_bytes", PHASES)
    on_gpu = "No trainer with a GPU was scraped"
    return [
        lines(
            "GPU utilisation", "Share of the time in which the GPU computes: the mean of a phase's GPUs, and the idlest.",
            line(f"avg by (phase) ({trainer('gpu_utilization_ratio', PHASES)})", "{{phase}}"),
            line(f"min by (phase) ({trainer('gpu_utilization_ratio', PHASES)})", "{{phase}}, idlest"),
            unit="percentunit", min=0, max=1, noValue=on_gpu,
        ),
        lines(
            "GPU memory", "In use on the fullest GPU of a phase, by any process, and what a GPU has.",
            line(f"max by (phase) ({used})", "{{phase}}"), line(f"max({total})", "size of a GPU"),
            unit="bytes", min=0, noValue=on_gpu,
        ),
        lines(
            "GPU power", "Of all GPUs of a phase.", line(f"sum by (phase) ({trainer('gpu_power_watts', PHASES)})", "{{phase}}"),
            unit="watt", min=0, noValue=on_gpu,
        ),
        lines(
            "Memory of the processes", "Resident memory of a phase's largest process. Compare it with the pods' limit.",
            line(f"max by (phase) ({trainer('memory_bytes', _kind('resident'))})", "{{phase}}"),
            unit="bytes", min=0, noValue=NOT_RUNNING,
        ),
        lines(
            "Memory allocated on the device", "By tensors of a phase's fullest process, now and at its peak.",
            line(f"max by (phase) ({trainer('memory_bytes', _kind('device'))})", "{{phase}}"),
            line(f"max by (phase) ({trainer('memory_bytes', _kind('device_peak'))})", "{{phase}}, peak"),
            unit="bytes", min=0, noValue=on_gpu,
        ),
        table(
            "Processes", "What trained within the time range: how many processes on what, with which version.",
            rows(f"count by (phase, device, processes, version) (last_over_time({trainer('info', SAID)}[$__range]))"),
            transformations=[transform(
                "organize",
                indexByName={"phase": 0, "device": 1, "processes": 2, "version": 3, "Value": 4},
                renameByName={
                    "phase": "Phase", "device": "Device", "processes": "Processes", "version": "Version", "Value": "Attempts",
                },
                excludeByName={"Time": True},
            )],
            width=8, noValue=NOT_RUNNING,
        ),
    ]  # fmt: skip


def _kind(kind: str) -> str:
    return f'{PHASES}, kind="{kind}"'


# -- checkpoints and progress


def _checkpoints() -> list[Object]:
    step_at, saved_at = trainer("last_step_timestamp_seconds", SAID), trainer("last_checkpoint_timestamp_seconds", SAID)
    written = trainer("checkpoints_total", SAID)
    return [
        lines(
            "Progress of the phases", "Finished share of the steps.", _said("progress_ratio"), unit="percentunit", min=0, max=1,
            noValue=NOT_RUNNING,
        ),
        lines(
            "Newest checkpoint", "Step of the newest checkpoint: what an attempt that fails now would go on from.",
            _said("checkpoint_step"), min=0, noValue=NOT_RUNNING,
        ),
        lines(
            "Age of the newest checkpoint", "Work that would be lost now, in seconds.",
            line(f"time() - max by (phase) ({saved_at})", "{{phase}}"), unit="s", min=0, noValue=NOT_RUNNING,
        ),
        lines(
            "Since the last step", "Seconds since the last finished step. One that only grows has stalled.",
            line(f"time() - max by (phase) ({step_at} > 0)", "{{phase}}"), unit="s", min=0,
            noValue=NOT_RUNNING,
        ),
        bars(
            "Checkpoints written", "Since their begin, by all attempts that were there within the time range.",
            now(f"round(sum by (phase) (max_over_time({written}[$__range])))", "{{phase}}"),
            min=0, decimals=0, thresholds=steps((None, BLUE)), noValue=NOT_RUNNING,
        ),
        table(
            "Retry budget", "Failed attempts by class, and what the run allows.",
            rows(f"max by (phase, class) ({operator('phase_retries_used', PHASES)})"),
            rows(f"max by (phase, class) ({operator('phase_retries_allowed', PHASES)})"),
            transformations=columns([
                ("phase", "Phase"), ("class", "Class"), ("Value #A", "Failed"), ("Value #B", "Allowed"),
            ]),
            width=8, noValue="No attempt has failed",
        ),
    ]  # fmt: skip


# -- results


def _results() -> list[Object]:
    win_rate = _results_like(".+/winRate")
    return [
        bars(
            "Win rate against the baseline", "Share of prompts on which the reward model prefers the model's response "
            "to the baseline's, ties half. 50 % is a draw. Known when the evaluation has ended.",
            now(f"sort_desc(max by (model) ({win_rate}))", "{{model}}"), unit="percentunit", min=0, max=1,
            thresholds=steps((None, ORANGE), (0.5, GREEN)), noValue="Not evaluated yet", height=12,
        ),
        matrix(
            "Models by what was measured", "Every figure of the evaluations: teacher, student and all others side by side.",
            rows(f"max by (model, measure) ({_results_like('.+/.+/.+')})"), column="model", row="measure", width=16,
            decimals=3, height=12, noValue="Not evaluated yet",
        ),
        matrix(
            "Final figures of the phases", "What each phase says of itself at its end, as in the run's status.",
            rows(f'max by (phase, metric) ({operator("phase_result", f"{PHASES}, {_PLAIN}")})'), column="phase", row="metric",
            decimals=3, height=10, noValue="No phase has ended",
        ),
    ]  # fmt: skip


_PLAIN = 'metric!~".+/.+"'


def _results_like(metric: str) -> str:
    """Evaluations' figures, `<model>/<benchmark>/<metric>`, with labels ``model`` and ``measure``."""
    found = operator("phase_result", f'{PHASES}, metric=~"{metric}"')
    with_model = f'label_replace({found}, "model", "$1", "metric", "([^/]+)/(.+)")'
    return f'label_replace({with_model}, "measure", "$2", "metric", "([^/]+)/(.+)")'


# -- annotations


def _annotations() -> list[Object]:
    def at(which: str, state: str = "") -> str:
        times = f"max by (phase) ({operator(f'phase_{which}_timestamp_seconds', PHASES)})"
        state_now = operator("phase_state", f'{PHASES}, state="{state}"')
        return f"{times} * 1000" + (f" and on (phase) {state_now}" if state else "")

    by, failures = "max by (phase, class)", operator("phase_retries_used", PHASES)
    after, before = f"{by} ({failures})", f"{by} ({failures} offset 30s)"
    grown = f"{after} > {before} or ({after} unless {before})"
    return [
        annotation("Phases begin", at("start"), "{{phase}} begins", BLUE, at_value=True),
        annotation("Phases succeed", at("end", "Succeeded"), "{{phase}} has succeeded", GREEN, at_value=True),
        annotation("Phases fail", at("end", "Failed"), "{{phase}} has failed", RED, at_value=True),
        annotation("Attempts fail", grown, "{{phase}}: {{class}}", YELLOW),
    ]

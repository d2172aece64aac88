"""Scenarios of the alerts about training, which the trainers' own series tell of."""

from alerts.scenario import PHASE, POD, Fires, Scenario, Series, running, silent, trainer, training

SFT = {**PHASE, "phase": "sft", "type": "sft"}
PPO = {**PHASE, "phase": "ppo", "type": "ppo"}
DISTILL = {**PHASE, "phase": "distill", "type": "distill"}
EVALUATE = {**PHASE, "phase": "eval", "type": "evaluate"}
SECOND = "helpful-dpo-2-worker-0"


def pod(labels=PHASE, attempt: int = 1) -> str:
    return f"helpful-{labels['phase']}-{attempt}-worker-0"


def of(labels, name: str, values: str, attempt: int = 1) -> Series:
    return trainer(name, values, labels, pod(labels, attempt))


# ---------------------------------------------------------------- loss


def loss(labels, value: str) -> Fires:
    return Fires(
        "AlignmentLossExploded",
        {**labels, "pod": pod(labels)},
        f"The loss of phase {labels['phase']} of run team-a/helpful has risen to {value}",
        f"The median loss of the last ten minutes in pod {pod(labels)} ({labels['type']}) is more than twice the lowest "
        "hourly median of the last twelve hours, or not finite.",
    )


LOSSES = (
    Scenario(
        "a language model's loss goes from 2 to 9",
        {**running(), **of(SFT, "loss", "2x60 9x120")},
        {59: (), 75: (loss(SFT, "9"),)},
    ),
    Scenario(
        "the loss goes up and stays there: nobody is told that it is well again",
        {**running(), **of(SFT, "loss", "2x60 50x240")},
        {59: (), 90: (loss(SFT, "50"),), 200: (loss(SFT, "50"),), 299: (loss(SFT, "50"),)},
    ),
    Scenario(
        "it ends with that; its mean over time would go on",
        {**running(70), **of(SFT, "loss", "2x60 9x14 stale")},
        {74: (loss(SFT, "9"),), 76: (), 80: ()},
        nearly=("AlignmentLossExploded",),
    ),
    Scenario(
        "the loss is not a number",
        {**running(), **of(PPO, "loss", "0.3x20" + 60 * " NaN")},
        {19: (), 30: (loss(PPO, "NaN"),)},
    ),
    Scenario(
        "the loss is infinite",
        {**running(), **of(DISTILL, "loss", "0.3x20" + 60 * " Inf")},
        {19: (), 30: (loss(DISTILL, "+Inf"),)},
    ),
    Scenario(
        "one bad batch",
        {**running(), **of(SFT, "loss", "2x60 9x1 2x120")},
        silent(61, 65, 70, 90),
        nearly=("AlignmentLossExploded",),
    ),
    Scenario(
        "a loss near zero trebles",
        {**running(), **of(PHASE, "loss", "0.02x60 0.06x120")},
        silent(65, 75, 120),
        nearly=("AlignmentLossExploded",),
    ),
    Scenario(
        "the next attempt begins where the loss was higher",
        {**running(), **of(PHASE, "loss", "0.2x60 stale"), **of(PHASE, "loss", "_x62 0.9x120", 2)},
        silent(65, 75, 120),
        nearly=("AlignmentLossExploded",),
    ),
    Scenario(
        "PPO's loss, a sum of terms around zero",
        {**running(), **of(PPO, "loss", "0.1x60 1.4x120")},
        silent(65, 75, 120),
        nearly=("AlignmentLossExploded",),
    ),
)

# ---------------------------------------------------------------- KL, reward


def kl(labels, value: str) -> Fires:
    return Fires(
        "AlignmentKlExploded",
        {**labels, "pod": pod(labels)},
        f"The KL divergence of phase {labels['phase']} of run team-a/helpful has reached {value} nats per token",
        f"The model in pod {pod(labels)} ({labels['type']}) has left its reference, or a student its teacher: the median of the "
        "last ten minutes is above 1 and three times the lowest hourly median of the last twelve hours, above 5 in another phase "
        "than distill, or not finite.",
    )


def exploits(reward: str) -> Fires:
    return Fires(
        "AlignmentRewardOveroptimized",
        {**PPO, "pod": pod(PPO)},
        "Phase ppo of run team-a/helpful may be exploiting its reward model",
        f"The reward in pod {pod(PPO)} still rises (now {reward}) while the KL divergence from the reference or the length of "
        "the responses runs away.",
    )


REWARDS = (
    Scenario(
        "the policy leaves its reference within minutes, and its reward falls",
        {**running(), **of(PPO, "kl_nats", "0.1x60 2.5x120"), **of(PPO, "reward", "1x60 0.2x120")},
        {59: (), 75: (kl(PPO, "2.5"),)},
    ),
    Scenario(
        "it was far away from the begin, which a mean over an hour does not tell",
        {**running(), **of(PPO, "kl_nats", "7x120")},
        {20: (kl(PPO, "7"),)},
    ),
    Scenario(
        "a student leaves its teacher",
        {**running(), **of(DISTILL, "kl_nats", "0.2x60 1.5x120")},
        {59: (), 75: (kl(DISTILL, "1.5"),)},
    ),
    Scenario(
        "KL that is not a number",
        {**running(), **of(PPO, "kl_nats", "0.2x20" + 60 * " NaN")},
        {19: (), 30: (kl(PPO, "NaN"),)},
    ),
    Scenario(
        "a student begins far from its teacher and comes nearer",
        {**running(), **of(DISTILL, "kl_nats", "4-0.03x120"), **of(DISTILL, "reward", "0+0.01x120")},
        silent(5, 20, 60, 119),
        nearly=("AlignmentKlExploded",),
    ),
    Scenario(
        "a student without pretraining begins as far from its teacher as can be",
        {**running(), **of(DISTILL, "kl_nats", "9-0.05x120"), **of(DISTILL, "reward", "0+0.01x120")},
        silent(5, 20, 30, 60, 119),
        nearly=("AlignmentKlExploded",),
    ),
    Scenario(
        "KL grows from nothing to 0.4, as it must for anything to be learnt",
        {**running(), **of(PPO, "kl_nats", "0+0.004x100 0.4x100"), **of(PPO, "reward", "0+0.01x200")},
        silent(10, 30, 60, 100, 199),
        nearly=("AlignmentKlExploded", "AlignmentRewardOveroptimized"),
    ),
    Scenario(
        "one round far out",
        {**running(), **of(PPO, "kl_nats", "0.2x60 6x1 0.2x60"), **of(PPO, "reward", "0+0.01x120")},
        silent(61, 65, 71, 100),
        nearly=("AlignmentKlExploded",),
    ),
    Scenario(
        "reward rises and KL with it, faster and faster",
        {**running(), **of(PPO, "kl_nats", "0.3x120 0.9x120"), **of(PPO, "reward", "1x120 2+0.01x120")},
        {119: (), 160: (exploits("2.34"),)},
    ),
    Scenario(
        "reward rises because responses grow",
        {
            **running(),
            **of(PPO, "kl_nats", "0.1x240"),
            **of(PPO, "response_length_tokens", "200x120 500x120"),
            **of(PPO, "reward", "1x120 1.5x120"),
        },
        {119: (), 160: (exploits("1.5"),)},
    ),
    Scenario(
        "responses grow and reward falls: something else is wrong",
        {
            **running(),
            **of(PPO, "kl_nats", "0.1x240"),
            **of(PPO, "response_length_tokens", "200x120 500x120"),
            **of(PPO, "reward", "1x120 0.5x120"),
        },
        silent(119, 160, 200),
        nearly=("AlignmentRewardOveroptimized",),
    ),
    Scenario(
        "reward rises while KL and length stay where they are",
        {
            **running(),
            **of(PPO, "kl_nats", "0.6x300"),
            **of(PPO, "response_length_tokens", "200x300"),
            **of(PPO, "reward", "0+0.01x300"),
        },
        silent(60, 160, 299),
        nearly=("AlignmentRewardOveroptimized", "AlignmentKlExploded"),
    ),
    Scenario(
        "on another run's reward model a student's responses grow: distillation follows no reward",
        {
            **running(),
            **of(DISTILL, "response_length_tokens", "200x120 500x120"),
            **of(DISTILL, "reward", "1x120 1.5x120"),
        },
        silent(119, 160, 200),
        nearly=("AlignmentRewardOveroptimized",),
    ),
)

# ---------------------------------------------------------------- checkpoints


def old_checkpoint(age: str) -> Fires:
    return Fires(
        "AlignmentCheckpointOld",
        PHASE,
        f"The last checkpoint of phase dpo of run team-a/helpful is {age} old",
        "The dpo phase has gone on since; a failure now would cost all of that.",
    )


CHECKPOINTS = (
    Scenario(
        "a workspace that takes no checkpoints any more",
        {
            **running(),
            **of(PHASE, "step", "1+1x300"),
            **of(PHASE, "checkpoint_step", "1+1x30 31x270"),
            **of(PHASE, "last_checkpoint_timestamp_seconds", "0+60x30 1800x270"),
        },
        {60: (), 89: (), 100: (old_checkpoint("1h 10m 0s"),)},
    ),
    Scenario(
        "it goes on in another attempt",
        {
            **running(),
            **of(PHASE, "step", "1+1x99 stale"),
            **of(PHASE, "checkpoint_step", "31x99 stale"),
            **of(PHASE, "last_checkpoint_timestamp_seconds", "1800x99 stale"),
            **of(PHASE, "step", "_x110 32+1x60", 2),
            **of(PHASE, "checkpoint_step", "_x102 31x68", 2),
            **of(PHASE, "last_checkpoint_timestamp_seconds", "_x102 6120x68", 2),
        },
        {98: (old_checkpoint("1h 8m 0s"),), 104: (), 150: ()},
        nearly=("AlignmentCheckpointOld",),
    ),
    Scenario(
        "steps of 90 minutes with a checkpoint after each",
        {
            **running(),
            **of(PHASE, "step", "1x89 2x89 3x89"),
            **of(PHASE, "checkpoint_step", "1x90 2x89 3x88"),
            **of(PHASE, "last_checkpoint_timestamp_seconds", "0x90 5460x89 10860x88"),
        },
        silent(70, 89, 90, 91, 160, 250),
        nearly=("AlignmentCheckpointOld",),
    ),
    Scenario(
        "a phase without checkpoints: an evaluation",
        {**running(), **of(EVALUATE, "step", "1+1x300"), **of(EVALUATE, "last_step_timestamp_seconds", "0+60x300")},
        silent(70, 299),
        nearly=("AlignmentCheckpointOld",),
    ),
    Scenario(
        "a phase that makes no steps is stalled, its checkpoint is as good as it can be",
        {
            **running(),
            **of(PHASE, "step", "31x300"),
            **of(PHASE, "checkpoint_step", "31x300"),
            **of(PHASE, "last_checkpoint_timestamp_seconds", "1800x300"),
        },
        silent(100, 299),
        nearly=("AlignmentCheckpointOld",),
    ),
)

# ---------------------------------------------------------------- speed, GPUs


def slow(labels, rate: str) -> Fires:
    return Fires(
        "AlignmentThroughputHalved",
        {**labels, "pod": pod(labels)},
        f"Phase {labels['phase']} of run team-a/helpful is half as fast as it was",
        f"The first process, in pod {pod(labels)} ({labels['type']}), does {rate} tokens per second, less than half of its "
        "median over the last six hours, and its responses have not become shorter.",
    )


def idle(share: str) -> Fires:
    return Fires(
        "AlignmentGpuIdle",
        PHASE,
        "The GPUs of phase dpo of run team-a/helpful are idle",
        f"The GPUs of the dpo phase have been at work {share} of the time for half an hour, on average over its processes, "
        "although it has begun its steps.",
    )


def gpus(*values: str) -> Series:
    series: Series = {}
    for rank, text in enumerate(values):
        series |= trainer("gpu_utilization_ratio", text, rank=str(rank))
    return series


SPEEDS = (
    Scenario(
        "a neighbour takes the storage's bandwidth",
        {**running(), **of(PHASE, "tokens_per_second", "1000x120 400x120")},
        {119: (), 130: (), 150: (slow(PHASE, "400"),)},
    ),
    Scenario(
        "the whole phase is over, or suspended",
        {**running(150), **of(PHASE, "tokens_per_second", "1000x120 400x30 stale")},
        {150: (slow(PHASE, "400"),), 152: (), 158: ()},
        nearly=("AlignmentThroughputHalved",),
    ),
    Scenario(
        "PPO's responses become short, and a round costs the same",
        {
            **running(),
            **of(PPO, "tokens_per_second", "1000x120 400x120"),
            **of(PPO, "response_length_tokens", "200x120 80x120"),
        },
        silent(130, 150, 200),
        nearly=("AlignmentThroughputHalved",),
    ),
    Scenario(
        "PPO becomes slow, its responses as long as before",
        {
            **running(),
            **of(PPO, "tokens_per_second", "1000x120 400x120"),
            **of(PPO, "response_length_tokens", "200x240"),
        },
        {150: (slow(PPO, "400"),)},
    ),
    Scenario(
        "an evaluation goes on to a slower benchmark",
        {**running(), **of(EVALUATE, "step", "1x240"), **of(EVALUATE, "tokens_per_second", "1000x120 100x120")},
        silent(130, 150, 200),
        nearly=("AlignmentThroughputHalved",),
    ),
    Scenario(
        "other settings, another attempt: a larger model is slower",
        {
            **running(),
            **of(PHASE, "tokens_per_second", "1000x120 stale"),
            **of(PHASE, "tokens_per_second", "_x122 300x120", 2),
        },
        silent(125, 150, 200),
        nearly=("AlignmentThroughputHalved",),
    ),
    Scenario(
        "eight minutes of a slow network",
        {**running(), **of(PHASE, "tokens_per_second", "1000x120 300x8 1000x120")},
        silent(125, 130, 140, 200),
        nearly=("AlignmentThroughputHalved",),
    ),
    Scenario(
        "GPUs wait for data",
        {**running(), **of(PHASE, "step", "1+1x120"), **gpus("0.9x30 0.04x90", "0.9x30 0.06x90")},
        {29: (), 45: (), 75: (idle("5%"),)},
    ),
    Scenario(
        "a model loads for 50 minutes",
        {**running(), **of(PHASE, "step", "_x50 1+1x120"), **gpus("0x50 0.9x120", "0x50 0.9x120")},
        silent(45, 55, 65, 120),
        nearly=("AlignmentGpuIdle",),
    ),
    Scenario(
        "one GPU of four shows nothing, the others wait for it at work",
        {**running(), **of(PHASE, "step", "1+1x120"), **gpus("0x120", "1x120", "1x120", "1x120")},
        silent(60, 119),
        nearly=("AlignmentGpuIdle",),
    ),
    Scenario(
        "it saves for 20 minutes and ends",
        {**running(50), **of(PHASE, "step", "1+1x30 30x20 stale"), **gpus("0.9x30 0x20 stale")},
        silent(49, 52, 60, 70),
        nearly=("AlignmentGpuIdle",),
    ),
)

SCENARIOS = (
    *LOSSES,
    *REWARDS,
    *CHECKPOINTS,
    *SPEEDS,
    Scenario(
        "an old attempt's pod takes its time to end while the next one is at work",
        {**running(), **training(100), **training(300, pod=SECOND), **trainer("loss", "0.6x300", pod=POD)},
        silent(50, 101, 110, 299),
    ),
)

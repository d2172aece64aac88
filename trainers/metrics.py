"""What trainers measure: the one table of names that /metrics, dashboards, alerts and docs are made from."""

from dataclasses import dataclass
from typing import Any, Literal

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics

# Otherwise every counter has a series beside it that says when it began.
disable_created_metrics()

PREFIX = "alignment_trainer_"
COMMON_LABELS = ("run", "phase", "type", "rank")
PARTS = ("data", "rollout", "forward_backward", "optimizer", "checkpoint", "evaluation")


@dataclass(frozen=True)
class MetricDef:
    name: str
    kind: Literal["counter", "gauge", "histogram"]
    help: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()

    def collector(self, registry: CollectorRegistry, common: tuple[str, ...] = ()) -> Any:
        """What counts it; its labels are ``common`` and then its own."""
        kind = {"counter": Counter, "gauge": Gauge, "histogram": Histogram}[self.kind]
        extra = {"buckets": self.buckets} if self.buckets else {}
        return kind(self.name, self.help, common + self.labels, registry=registry, **extra)


STEP_BUCKETS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0, 1800.0)
"""Seconds; a step is anything between a toy's and a long rollout's."""

ANSWER_BUCKETS = (0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 60.0, 180.0)
"""Seconds of one answer of a served teacher, which is given up and asked for again after the last."""

# What training says is of all processes together and the same on each; take rank="0". What is counted, timed or
# measured on a device is each process's own; add it up.
METRICS: tuple[MetricDef, ...] = (
    MetricDef(PREFIX + "info", "gauge", "1; what this process is.", ("version", "device", "processes")),
    # -- progress
    MetricDef(PREFIX + "step", "gauge", "Finished steps."),
    MetricDef(PREFIX + "total_steps", "gauge", "Steps in all."),
    MetricDef(PREFIX + "progress_ratio", "gauge", "Finished share of the phase, 0 to 1."),
    MetricDef(PREFIX + "eta_seconds", "gauge", "Estimated seconds to the end."),
    MetricDef(PREFIX + "last_step_timestamp_seconds", "gauge", "Unix time of the last finished step; its age shows a stall."),
    MetricDef(PREFIX + "checkpoints_total", "counter", "Checkpoints written by this attempt."),
    MetricDef(PREFIX + "checkpoint_step", "gauge", "Step of the newest checkpoint."),
    MetricDef(PREFIX + "last_checkpoint_timestamp_seconds", "gauge", "Unix time of the newest checkpoint; before the first, of the attempt's begin."),
    # -- training, of the last step
    MetricDef(PREFIX + "loss", "gauge", "Training loss of the last step."),
    MetricDef(PREFIX + "learning_rate", "gauge", "Learning rate of the last step."),
    MetricDef(PREFIX + "grad_norm", "gauge", "Gradient norm of the last step, before clipping."),
    MetricDef(PREFIX + "accuracy_ratio", "gauge", "Share of the last step's pairs that are ranked right (reward, dpo)."),
    MetricDef(PREFIX + "reward", "gauge", "Mean reward of the last step (ppo, rollout, distill)."),
    MetricDef(PREFIX + "reward_margin", "gauge", "Mean reward of the chosen responses less that of the rejected (reward, dpo)."),
    MetricDef(PREFIX + "kl_nats", "gauge", "KL divergence per token in the last step: from the reference (ppo), from the teacher (distill)."),
    MetricDef(PREFIX + "entropy_nats", "gauge", "Entropy per sampled token in the last step (ppo)."),
    MetricDef(PREFIX + "clip_ratio", "gauge", "Share of the last step's tokens whose policy ratio was clipped (ppo)."),
    MetricDef(PREFIX + "response_length_tokens", "gauge", "Mean length of the last step's sampled responses (ppo, rollout, distill)."),
    MetricDef(PREFIX + "ended_ratio", "gauge", "Share of sampled responses that ended by themselves (ppo, rollout)."),
    MetricDef(PREFIX + "effective_sample_ratio", "gauge", "Effective sample size of the last step's reward weights, as a share of the samples (distill)."),
    MetricDef(PREFIX + "staleness_steps", "gauge", "Steps between the weights that sampled the last step's responses and those that learned from them (ppo, distill)."),
    MetricDef(PREFIX + "mismatch_nats", "gauge", "KL divergence per token of the trained policy from what sampled the last step's responses (ppo, distill)."),
    MetricDef(PREFIX + "importance_weight", "gauge", "Mean importance weight of the last step's sampled tokens; 1 where nothing is corrected or cut off (ppo, distill)."),
    MetricDef(PREFIX + "importance_truncated_ratio", "gauge", "Share of the last step's sampled tokens whose importance weight was cut off (ppo, distill)."),
    MetricDef(PREFIX + "eval_loss", "gauge", "Loss on held-out data, when it was last looked at (sft, reward, dpo)."),
    MetricDef(PREFIX + "eval_accuracy_ratio", "gauge", "Share of held-out pairs that are ranked right, when it was last looked at (reward, dpo)."),
    # -- served teachers, by the name that rows have for them
    MetricDef(PREFIX + "teacher_answer_seconds", "histogram", "Duration of an answer of a served teacher to this process (distill).", ("teacher",), ANSWER_BUCKETS),
    MetricDef(PREFIX + "teacher_retries_total", "counter", "Times that this process asked a served teacher again, which had not answered or had said to wait (distill).", ("teacher",)),
    MetricDef(PREFIX + "teacher_loss_ratio", "gauge", "Share of the last step's loss that is of a served teacher's rows, where there are several (distill).", ("teacher",)),
    # -- throughput
    MetricDef(PREFIX + "tokens_total", "counter", "Tokens processed by this process, padding not counted."),
    MetricDef(PREFIX + "samples_total", "counter", "Examples processed by this process."),
    MetricDef(PREFIX + "tokens_per_second", "gauge", "Tokens per second of this process over the last steps."),
    MetricDef(PREFIX + "step_seconds", "histogram", "Duration of a step.", (), STEP_BUCKETS),
    MetricDef(PREFIX + "part_seconds_total", "counter", "Seconds spent, by part of the step.", ("part",)),
    MetricDef(PREFIX + "model_flops_total", "counter", "Floating-point operations that the model needs for the tokens processed, recomputation and padding not counted."),
    MetricDef(PREFIX + "peak_flops_per_second", "gauge", "Peak dense bf16 operations per second of this process's device; absent where it is not known."),
    # -- memory and device
    MetricDef(PREFIX + "memory_bytes", "gauge", "Memory of this process: resident, and on the device allocated and at its peak.", ("kind",)),
    MetricDef(PREFIX + "gpu_utilization_ratio", "gauge", "Share of the last moments in which the GPU was at work (NVML)."),
    MetricDef(PREFIX + "gpu_memory_used_bytes", "gauge", "Memory in use on the GPU, by any process (NVML)."),
    MetricDef(PREFIX + "gpu_memory_total_bytes", "gauge", "Memory of the GPU (NVML)."),
    MetricDef(PREFIX + "gpu_power_watts", "gauge", "Power that the GPU draws (NVML)."),
)  # fmt: skip

GAUGES_FROM_LOG = {
    "loss": "loss",
    "learning_rate": "learning_rate",
    "grad_norm": "grad_norm",
    "accuracy": "accuracy_ratio",
    "reward": "reward",
    "kl": "kl_nats",
    "entropy": "entropy_nats",
    "clip_fraction": "clip_ratio",
    "response_length": "response_length_tokens",
    "ended_share": "ended_ratio",
    "ess_share": "effective_sample_ratio",
    "staleness": "staleness_steps",
    "mismatch": "mismatch_nats",
    "importance_weight": "importance_weight",
    "importance_truncated": "importance_truncated_ratio",
    "eval_loss": "eval_loss",
    "eval_accuracy": "eval_accuracy_ratio",
}
"""A phase's word in metrics.jsonl to the gauge."""

PAIRWISE = ("reward", "dpo")
"""Types whose `reward` is a margin."""

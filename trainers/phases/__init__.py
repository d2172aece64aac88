"""The registry of phase types. To add one, see "Add a phase" in the README."""

from trainers.contract import PhaseType
from trainers.phases.distill.spec import DistillSpec
from trainers.phases.dpo.spec import DpoSpec
from trainers.phases.evaluate.spec import EvaluateSpec
from trainers.phases.package.spec import PackageSpec
from trainers.phases.ppo.spec import PpoSpec
from trainers.phases.reward.spec import RewardSpec
from trainers.phases.rollout.spec import RolloutSpec
from trainers.phases.sft.spec import SftSpec

REGISTRY: tuple[PhaseType, ...] = (
    PhaseType("sft", SftSpec, "trainers.phases.sft.train", "model"),
    PhaseType("reward", RewardSpec, "trainers.phases.reward.train", "reward-model"),
    PhaseType("dpo", DpoSpec, "trainers.phases.dpo.train", "model"),
    PhaseType("ppo", PpoSpec, "trainers.phases.ppo.train", "model"),
    PhaseType("rollout", RolloutSpec, "trainers.phases.rollout.run", "traces"),
    PhaseType("distill", DistillSpec, "trainers.phases.distill.train", "model", reads_beside=("top-k/*.safetensors",)),
    PhaseType("evaluate", EvaluateSpec, "trainers.phases.evaluate.run", "evaluation"),
    PhaseType(
        "package",
        PackageSpec,
        "trainers.phases.package.run",
        "package",
        reads_all=True,
        reads_beside=("metrics.jsonl", "latency.json", "responses/*.jsonl"),
    ),
)


def phase_type(name: str) -> PhaseType:
    return next(entry for entry in REGISTRY if entry.name == name)

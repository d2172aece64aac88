"""One small phase of every type, and the ways of spreading it over processes."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

SAMPLING = {"maxNewTokens": 6}
STEPS = {"batchSize": 8, "duration": {"maxSteps": 4}, "optim": {"lr": 3e-3}}
LORA = {"rank": 4, "targetModules": ["q_proj", "down_proj"]}


@dataclass(frozen=True)
class Way:
    """How processes share the work."""

    parallel: dict[str, Any]
    processes: int = 2
    nodes: int = 1
    changes: dict[str, Any] = field(default_factory=dict)
    """Of phases that train, such as adapters; the run that it is compared with has them too."""


FSDP = {"strategy": "fsdp"}

WAYS = {
    "ddp": Way({"strategy": "ddp"}),
    "fsdp": Way(FSDP),
    "fsdp on four": Way(FSDP, processes=4),
    "fsdp alone": Way(FSDP, processes=1),
    "fsdp, layers kept": Way(FSDP | {"fsdp": {"reshardAfterForward": False}}),
    "fsdp, offloaded": Way(FSDP | {"fsdp": {"cpuOffload": True}, "frozen": "offloaded"}),
    "fsdp, hybrid": Way(FSDP | {"fsdp": {"hybrid": True}}, processes=4, nodes=2),
    "fsdp, checkpointed": Way(FSDP | {"gradientCheckpointing": True}),
    "fsdp, one sequence at a time": Way(FSDP | {"microBatchTokens": 8}),
    "fsdp, whole frozen models": Way(FSDP | {"frozen": "replicated"}),
    "ddp, split frozen models": Way({"strategy": "ddp", "frozen": "sharded"}),
    "fsdp, adapters": Way(FSDP, changes={"lora": LORA}),
}

ZERO = {"strategy": "deepspeed"}
ELSEWHERE = {"stage": 3, "offloadOptimizer": True, "offloadParameters": True}

WAYS |= {
    "zero 1": Way(ZERO | {"deepspeed": {"stage": 1}}),
    "zero 2": Way(ZERO),
    "zero 2, offloaded": Way(ZERO | {"deepspeed": {"stage": 2, "offloadOptimizer": True}}),
    "zero 2 alone": Way(ZERO, processes=1),
    "zero 3": Way(ZERO | {"deepspeed": {"stage": 3}}),
    "zero 3, offloaded": Way(ZERO | {"deepspeed": ELSEWHERE}),
    "zero 3, checkpointed": Way(ZERO | {"deepspeed": {"stage": 3}, "gradientCheckpointing": True}),
    "zero 3, adapters": Way(ZERO | {"deepspeed": {"stage": 3}}, changes={"lora": LORA}),
    "zero 3, whole frozen models": Way(ZERO | {"deepspeed": {"stage": 3}, "frozen": "replicated"}),
}


def data(split: str, count: int) -> dict[str, Any]:
    return {"synthetic": {"task": "letters", "split": split, "count": count}}


def rows(split: str) -> dict[str, Any]:
    return {"train": [data(split, 48)], "eval": [data(split, 8)], "maxLength": 64}


def phases(model: Path, reward_model: Path) -> dict[str, dict[str, Any]]:
    """Specs by type. Together they train, score, generate and compare with every kind of model."""
    source, reward = {"source": str(model)}, {"source": str(reward_model)}
    prompts = {"prompts": [data("prompts", 24)]}
    return {
        "sft": {"model": source, "data": rows("demonstrations"), **STEPS},
        "reward": {"model": source, "data": rows("preferences"), "lmWeight": 0.1, **STEPS},
        "dpo": {"policy": source, "data": rows("preferences"), **STEPS},
        "ppo": {
            "policy": source, "rewardModel": reward, "data": prompts, "sampling": SAMPLING,
            "iterations": 2, "batchSize": 8, "optim": {"lr": 3e-3},
        },
        "rollout": {"policy": source, "rewardModel": reward, "data": prompts, "sampling": SAMPLING},
        "distill": {
            "teacher": source, "student": {"teacherLayers": [1]}, "prompts": prompts, "onPolicyFraction": 1,
            "sampling": SAMPLING, "maxLength": 64, "rewardModel": reward, **STEPS,
        },
        "evaluate": {
            "models": [source | {"name": "base"}], "latency": {"enabled": False},
            "benchmarks": [
                {"name": "perplexity", "perplexity": {"data": {"rows": [data("demonstrations", 8)]}}},
                {"name": "reward", "reward": {"data": {"rows": [data("prompts", 8)]}, "sampling": SAMPLING}},
            ],
            "rewardModel": reward,
        },
    }  # fmt: skip

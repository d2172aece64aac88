"""One small phase of every type, and the ways of spreading it over processes."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

SAMPLING = {"maxNewTokens": 6}
STEPS = {
    "batchSize": 8, "duration": {"maxSteps": 4}, "optim": {"lr": 3e-3, "weightDecay": 0.1},
    "checkpoint": {"everySteps": 1, "keepLast": 1},
}  # fmt: skip
LORA = {"rank": 4, "targetModules": ["q_proj", "down_proj"]}

TRAINED = ("sft", "reward", "dpo", "ppo", "distill")
OTHERS = ("rollout", "evaluate", "package")
KINDS = (*TRAINED, *OTHERS)
TRAINEES = {"model", "policy", "student"}
"""Fields that name the model that is trained."""


@dataclass(frozen=True)
class Way:
    """How processes share the work."""

    parallel: dict[str, Any]
    processes: int = 2
    nodes: int = 1
    changes: dict[str, Any] = field(default_factory=dict)
    """Of phases that train, such as adapters; the run that it is compared with has them too."""
    bf16: bool = False
    """Whether it computes in bf16, as the run that it is compared with."""
    held_in_bf16: bool = False
    """Whether weights that are trained are held in bf16, there as well."""

    def document(self, kind: str, spec: dict[str, Any]) -> dict[str, Any]:
        """A phase's spec done this way."""
        precision = {"precision": "bf16"} if self.bf16 else {}
        more = self.changes if kind in TRAINED else {}
        if kind in TRAINED and self.held_in_bf16:
            more = more | {name: spec[name] | {"dtype": "bf16"} for name in TRAINEES & spec.keys()}
        return spec | more | {"parallel": {"microBatchTokens": 128} | precision | self.parallel}

    @property
    def alone(self) -> "Way":
        """The run in one process that it is compared with."""
        return Way({"strategy": "single"}, 1, changes=self.changes, bf16=self.bf16, held_in_bf16=self.held_in_bf16)


SINGLE, DDP, FSDP, ZERO = ({"strategy": name} for name in ("single", "ddp", "fsdp", "deepspeed"))
ONE_BY_ONE = {"microBatchTokens": 8}
CHECKPOINTED = {"gradientCheckpointing": True}
ADAPTERS = {"lora": LORA}
ZERO_1, ZERO_3 = (ZERO | {"deepspeed": {"stage": stage}} for stage in (1, 3))
ELSEWHERE = {"stage": 3, "offloadOptimizer": True, "offloadParameters": True}
HYBRID = FSDP | {"fsdp": {"hybrid": True}}

WAYS = {
    "single, one sequence at a time": Way(SINGLE | ONE_BY_ONE, processes=1),
    "single, all at once": Way(SINGLE | {"microBatchTokens": 4096}, processes=1),
    "single, checkpointed": Way(SINGLE | CHECKPOINTED, processes=1),
    "ddp": Way(DDP),
    "ddp, one sequence at a time": Way(DDP | ONE_BY_ONE),
    "ddp, checkpointed": Way(DDP | CHECKPOINTED),
    "ddp, adapters": Way(DDP, changes=ADAPTERS),
    "ddp, split frozen models": Way(DDP | {"frozen": "sharded"}),
    "fsdp": Way(FSDP),
    "fsdp on four": Way(FSDP, processes=4),
    "fsdp alone": Way(FSDP, processes=1),
    "fsdp, layers kept": Way(FSDP | {"fsdp": {"reshardAfterForward": False}}),
    "fsdp, offloaded": Way(FSDP | {"fsdp": {"cpuOffload": True}, "frozen": "offloaded"}),
    "fsdp, hybrid": Way(HYBRID, processes=4, nodes=2),
    "fsdp, checkpointed": Way(FSDP | CHECKPOINTED),
    "fsdp, one sequence at a time": Way(FSDP | ONE_BY_ONE),
    "fsdp, whole frozen models": Way(FSDP | {"frozen": "replicated"}),
    "fsdp, adapters": Way(FSDP, changes=ADAPTERS),
    "fsdp, hybrid, adapters": Way(HYBRID | CHECKPOINTED, processes=4, nodes=2, changes=ADAPTERS),
    "zero 1": Way(ZERO_1),
    "zero 2": Way(ZERO),
    "zero 2, offloaded": Way(ZERO | {"deepspeed": {"stage": 2, "offloadOptimizer": True}}),
    "zero 2 alone": Way(ZERO, processes=1),
    "zero 2, one sequence at a time": Way(ZERO | ONE_BY_ONE),
    "zero 2, adapters": Way(ZERO | CHECKPOINTED, changes=ADAPTERS),
    "zero 3": Way(ZERO_3),
    "zero 3, offloaded": Way(ZERO | {"deepspeed": ELSEWHERE}),
    "zero 3, checkpointed": Way(ZERO_3 | CHECKPOINTED),
    "zero 3, one sequence at a time": Way(ZERO_3 | ONE_BY_ONE),
    "zero 3, adapters": Way(ZERO_3, changes=ADAPTERS),
    "zero 3, whole frozen models": Way(ZERO_3 | {"frozen": "replicated"}),
    "ddp in bf16": Way(DDP, bf16=True),
    "fsdp alone in bf16": Way(FSDP, processes=1, bf16=True),
    "fsdp in bf16": Way(FSDP, bf16=True),
    "zero 1 in bf16": Way(ZERO_1, bf16=True),
    "zero 2 in bf16": Way(ZERO, bf16=True),
    "zero 3 in bf16": Way(ZERO_3, bf16=True),
    "fsdp, adapters in bf16": Way(FSDP, changes=ADAPTERS, bf16=True),
    "zero 2, adapters in bf16": Way(ZERO, changes=ADAPTERS, bf16=True),
    "zero 3, adapters in bf16": Way(ZERO_3, changes=ADAPTERS, bf16=True),
    "ddp, weights in bf16": Way(DDP, bf16=True, held_in_bf16=True),
    "fsdp, weights in bf16": Way(FSDP, bf16=True, held_in_bf16=True),
    "zero 1, weights in bf16": Way(ZERO_1, bf16=True, held_in_bf16=True),
    "zero 2, weights in bf16": Way(ZERO, bf16=True, held_in_bf16=True),
    "zero 3, weights in bf16": Way(ZERO_3, bf16=True, held_in_bf16=True),
}


def data(split: str, count: int) -> dict[str, Any]:
    return {"synthetic": {"task": "letters", "split": split, "count": count}}


def rows(split: str) -> dict[str, Any]:
    return {"train": [data(split, 48)], "eval": [data(split, 8)], "maxLength": 64}


def phases(model: Path, reward_model: Path, kinds: Iterable[str] = KINDS) -> dict[str, dict[str, Any]]:
    """Specs by type. Together they train, score, generate and compare with every kind of model."""
    source, reward = {"source": str(model)}, {"source": str(reward_model)}
    prompts = {"prompts": [data("prompts", 24)]}
    found = {
        "sft": {"model": source, "data": rows("demonstrations"), **STEPS},
        "reward": {"model": source, "data": rows("preferences"), "lmWeight": 0.1, **STEPS},
        "dpo": {"policy": source, "data": rows("preferences"), **STEPS},
        "ppo": {
            "policy": source, "rewardModel": reward, "data": prompts, "sampling": SAMPLING,
            "iterations": 3, "batchSize": 8, "optim": STEPS["optim"], "checkpoint": STEPS["checkpoint"],
        },
        "distill": {
            "teacher": source, "student": {"teacherLayers": [1]}, "prompts": prompts, "onPolicyFraction": 1,
            "sampling": SAMPLING, "maxLength": 64, "rewardModel": reward, **STEPS,
        },
        "rollout": {"policy": source, "rewardModel": reward, "data": prompts, "sampling": SAMPLING},
        "evaluate": {
            "models": [source | {"name": "base"}], "latency": {"enabled": False},
            "benchmarks": [
                {"name": "perplexity", "perplexity": {"data": {"rows": [data("demonstrations", 8)]}}},
                {"name": "reward", "reward": {"data": {"rows": [data("prompts", 8)]}, "sampling": SAMPLING}},
            ],
            "rewardModel": reward,
        },
        "package": {},
    }  # fmt: skip
    return {kind: found[kind] for kind in kinds}

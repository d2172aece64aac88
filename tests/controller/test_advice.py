"""What plans advise: every word of it is a setting that the phase has, is needed, and makes it fit."""

import re
from typing import Any

import pytest
import yaml
from builders import PAIRS, PROMPTS, make_run
from sized import CONFIGS, ON_POLICY, QWEN_1B, SEVENTY, tuned

from controller.plan.advice import SHORT_PASS
from controller.plan.check import check_run
from controller.plan.sizes import PhaseSize, run_sizes

ROWS = [{"synthetic": {"task": "letters", "split": "prompts", "count": 8}}]
REWARD = {"rewardModel": {"source": "org/scalar"}}
SAMPLED = {"sampling": {"batchSize": 256}}
PHASES: dict[str, dict[str, Any]] = {
    "sft": tuned("org/big", "p"),
    "adapters": tuned("org/big", "p", lora={"rank": 16}),
    "packed": tuned("org/big", "p", lora={"rank": 16, "quantization": "nf4"}),
    "reward": {"name": "p", "reward": {"model": {"source": "org/big"}, "data": PAIRS}},
    "dpo": {"name": "p", "dpo": {"policy": {"source": "org/big"}, "data": PAIRS, "referenceScores": "on-the-fly"}},
    "ppo": {"name": "p", "ppo": {"policy": {"source": "org/big"}, "data": PROMPTS, **REWARD}},
    "rollout": {"name": "p", "rollout": {"policy": {"source": "org/big"}, "data": PROMPTS, **REWARD, **SAMPLED}},
    "distill": {
        "name": "p",
        "distill": {"teacher": {"source": "org/big"}, "student": {"source": "org/small"}, **ON_POLICY, **REWARD},
    },
    "evaluate": {
        "name": "p",
        "evaluate": {
            "models": [{"source": "org/big", "name": "big"}],
            "data": {"rows": ROWS},
            "benchmarks": [{"name": "short", "length": {}}, {"name": "wide", "length": SAMPLED}],
        },
    },
}
STRATEGIES: dict[str, dict[str, Any]] = {
    "auto": {},
    "replicated": {"frozen": "replicated"},
    "ddp": {"strategy": "ddp", "gradientCheckpointing": True},
    "fsdp": {"strategy": "fsdp"},
    "hybrid": {"strategy": "fsdp", "fsdp": {"hybrid": True, "reshardAfterForward": False}},
    "offloaded": {"strategy": "fsdp", "fsdp": {"cpuOffload": True}},
    "zero1": {"strategy": "deepspeed", "deepspeed": {"stage": 1}},
    "zero2": {"strategy": "deepspeed"},
    "zero3": {"strategy": "deepspeed", "deepspeed": {"stage": 3, "offloadOptimizer": True}},
    "compiled": {"strategy": "deepspeed", "deepspeed": {"stage": 2}, "compile": True},
    "file": {"strategy": "deepspeed", "deepspeed": {"stage": 2, "config": "zero.json"}},
    "single": {"strategy": "single"},
}
PLACES = {"1x1": (1, 1), "2x8": (2, 8)}
MEMORY = ("22Gi", "80Gi")
SIZES = CONFIGS | {
    ("org/scalar", None): QWEN_1B | {"num_labels": 1},
    ("org/70b", None): SEVENTY,
}


def with_parallel(phase: dict[str, Any], parallel: dict[str, Any]) -> dict[str, Any]:
    (kind,) = phase.keys() - {"name"}
    return {"name": "p", kind: phase[kind] | {"parallel": parallel}}


def run_with(phase: dict[str, Any], nodes: int, procs: int, memory: str, machine: str = "2Ti"):
    template = {
        "nodes": nodes,
        "procsPerNode": procs,
        "gpuMemory": memory,
        "resources": {"limits": {"memory": machine}},
    }
    return make_run(phase, template=template)


def settings_of(advice: str) -> dict[str, Any]:
    said = re.fullmatch(r"would fit with ((?:[\w.]+: [\w-]+(?:, )?)+): [0-9.]+ [GM]iB.*", advice)
    assert said, advice
    return {path: yaml.safe_load(value) for path, value in (part.split(": ") for part in said[1].split(", "))}


def applied(phase: dict[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
    """The phase as somebody writes it who follows the advice."""
    phase = yaml.safe_load(yaml.safe_dump(phase))
    (kind,) = phase.keys() - {"name"}
    for path, value in settings.items():
        top, *_ = path.split(".")
        full = path if top in ("sampling", "benchmarks") else f"parallel.{path}"
        *way, last = full.split(".")
        at = phase[kind]
        for name in way:
            at = next(i for i in at if i["name"] == name) if isinstance(at, list) else at.setdefault(name, {})
        at.pop(last, None) if value is None else at.update({last: value})
    return phase


def size_with(phase: dict[str, Any], settings: dict[str, Any], place: tuple[int, int], memory: str) -> PhaseSize | None:
    settings = dict(settings)
    nodes = settings.pop("nodes", place[0])
    try:
        run = run_with(applied(phase, settings), nodes, place[1], memory)
    except ValueError:
        return None
    return None if check_run(run) else run_sizes(run, SIZES)["p"]


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("kind", PHASES)
def test_advice_is_what_the_phase_has_and_needs(kind, strategy):
    advised = 0
    for place in PLACES.values():
        for memory in MEMORY:
            phase = with_parallel(PHASES[kind], STRATEGIES[strategy])
            before = size_with(phase, {}, place, memory)
            if before is None or before.fits is not False or before.advice.startswith("no strategy"):
                continue
            advised += 1
            follow(phase, before, place, memory)
    # What fits with fewer responses side by side needs no advice.
    assert advised or kind in ("packed", "distill", "evaluate", "rollout"), "the sizes here tell nothing"


def follow(phase: dict[str, Any], before: PhaseSize, place: tuple[int, int], memory: str) -> None:
    settings = settings_of(before.advice)
    after = size_with(phase, settings, place, memory)
    assert after is not None, f"refused: {before.advice}"
    assert after.fits is True, before.advice
    assert after.needs.memory.total < before.needs.memory.total or before.needs.memory.offloaded
    for path in settings:
        less = {name: value for name, value in settings.items() if name != path}
        if path == "gradientCheckpointing" and less.get("microBatchTokens", SHORT_PASS) < SHORT_PASS:
            continue
        without = size_with(phase, less, place, memory)
        assert without is None or without.fits is False or without.by_layers, f"{path} is not needed: {before.advice}"

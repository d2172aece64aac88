"""What a plan says of memory against what phases then reach, above the same phase with a model of no size.

`make test-memory` measures all cells, `make test` one.
"""

import json
from pathlib import Path
from typing import Any

import pytest
from measured_memory import reached

from trainers.phases import phase_type
from trainers.sizing.memory import Place
from trainers.sizing.phases import phase_needs
from trainers.sizing.shapes import ModelShape, shape_of

WITHIN = 0.2
"""Share of the measured peak that a plan may be off by."""

LORA = {"lora": {"rank": 8}}
CHECKPOINTING = {"gradientCheckpointing": True}
FSDP = {"strategy": "fsdp"}
TYPES = ("sft", "reward", "dpo", "ppo", "distill")
SETTINGS: list[tuple[int, dict[str, Any], dict[str, Any]]] = [
    (1, {}, {}),
    (1, CHECKPOINTING, {}),
    (1, {}, LORA),
    (2, {}, {}),
    (2, FSDP, {}),
    (2, FSDP | CHECKPOINTING, {}),
    (2, FSDP, LORA),
]
"""Processes, how they share the work, and what is trained."""
CELLS = [(kind, *setting) for setting in SETTINGS for kind in TYPES]
ALWAYS = [("sft", 1, {}, {})]


def name_of(cell) -> str:
    kind, processes, parallel, more = cell
    strategy = parallel.get("strategy", "single" if processes == 1 else "ddp")
    return "-".join([kind, f"{strategy}x{processes}", *parallel.keys() - {"strategy"}, *more])


@pytest.fixture(scope="session")
def models(tiny_model_dir, tmp_path_factory) -> dict[str, Path]:
    """By `size` and `size-reward`; a small model and one whose parameters and activations are no noise."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    large = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 4, "vocab_size": 8192, "head_dim": 128}
    found = {}
    for size, changes in (("small", {}), ("large", large)):
        config = AutoConfig.from_pretrained(tiny_model_dir, num_labels=1, **changes)
        for name, auto in ((size, AutoModelForCausalLM), (f"{size}-reward", AutoModelForSequenceClassification)):
            found[name] = tmp_path_factory.mktemp(name)
            auto.from_config(config).save_pretrained(found[name])
            tokenizer.save_pretrained(found[name])
    return found


LENGTH, PASS = 64, 512
"""Tokens of a sequence, and of a forward pass."""


@pytest.fixture(scope="session")
def rows(tmp_path_factory) -> dict[str, str]:
    """Files of rows whose sequences all have the same length: what is too long loses the left end of its prompt."""
    prompt, answers = "copy A B C " * 16, ["A B C D " * 5, "B C D E " * 5]
    kinds = {
        "sft": {"prompt": prompt, "response": answers[0]},
        "pairs": {"prompt": prompt, "chosen": answers[0], "rejected": answers[1]},
        "prompts": {"prompt": "copy A B C " * 8},
    }
    folder = tmp_path_factory.mktemp("rows")
    for name, row in kinds.items():
        (folder / f"{name}.jsonl").write_text(f"{json.dumps(row)}\n" * 64)
    return {name: str(folder / f"{name}.jsonl") for name in kinds}


def spec_of(cell, models: dict[str, Path], rows: dict[str, str], size: str) -> dict[str, Any]:
    """Two steps of two passes: moments are there from the second step on, and gradients from a step's second pass on."""
    kind, processes, parallel, more = cell
    model, reward = {"source": str(models[size])}, {"source": str(models[f"{size}-reward"])}
    prompts = {"prompts": [{"files": rows["prompts"]}], "maxPromptLength": LENGTH}
    sequences = 2 * processes * PASS // LENGTH
    common = {
        "parallel": {"microBatchTokens": PASS, **parallel},
        "checkpoint": {"everySeconds": None},
        "batchSize": sequences // 2 if kind in ("reward", "dpo") else sequences,
        **more,
    }
    steps, sampling = {"duration": {"maxSteps": 2}}, {"sampling": {"maxNewTokens": 24}}
    data = {name: {"train": [{"files": rows[name]}], "maxLength": LENGTH} for name in ("sft", "pairs")}
    return {
        "sft": {"model": model, "data": data["sft"], **steps},
        "reward": {"model": model, "data": data["pairs"], **steps},
        "dpo": {"policy": model, "data": data["pairs"], **steps},
        "ppo": {"policy": model, "rewardModel": reward, "data": prompts, "iterations": 2, "ppoEpochs": 1, **sampling},
        "distill": {
            "teacher": model, "student": model, "prompts": prompts, "onPolicyFraction": 1, "maxLength": LENGTH + 24,
            **steps, **sampling,
        },
    }[kind] | common  # fmt: skip


def planned(cell, models: dict[str, Path], rows: dict[str, str]) -> int:
    def shape(ref) -> ModelShape:
        return shape_of(json.loads((Path(ref.source) / "config.json").read_text()))

    kind, processes, _, _ = cell
    spec = phase_type(kind).spec.model_validate(spec_of(cell, models, rows, "large"))
    needs = phase_needs(spec, Place(spec.parallel, procs_per_node=processes), shape)
    assert needs is not None
    print(needs.memory)
    return needs.memory.total


@pytest.fixture(scope="session")
def baselines(models, rows, tmp_path_factory):
    """What a phase reaches with a model of no size, by type and number of processes."""
    found: dict[tuple[str, int], int] = {}

    def baseline(kind: str, processes: int) -> int:
        if (kind, processes) not in found:
            spec = spec_of((kind, processes, {}, {}), models, rows, "small")
            found[kind, processes] = reached(kind, spec, tmp_path_factory.mktemp("base") / kind, processes).between
        return found[kind, processes]

    return baseline


def check(cell, models: dict[str, Path], rows: dict[str, str], baselines, folder: Path) -> None:
    kind, processes, _, _ = cell
    found = reached(kind, spec_of(cell, models, rows, "large"), folder / kind, processes)
    base, said = baselines(kind, processes), planned(cell, models, rows)
    measured = found.peak - base
    figures = ", ".join(f"{size / 2**20:.0f}" for size in (said, measured, base))
    print(f"{name_of(cell)}: MiB said, measured, beneath: {figures}; {said / measured:.2f}", flush=True)
    assert abs(said / measured - 1) < WITHIN


@pytest.mark.parametrize("cell", ALWAYS, ids=name_of)
def test_a_phase_reaches_what_its_plan_says(cell, models, rows, baselines, tmp_path):
    check(cell, models, rows, baselines, tmp_path)


@pytest.mark.memory
@pytest.mark.parametrize("cell", [cell for cell in CELLS if cell not in ALWAYS], ids=name_of)
def test_every_phase_reaches_what_its_plan_says(cell, models, rows, baselines, tmp_path):
    check(cell, models, rows, baselines, tmp_path)

"""What a plan says of memory against what phases then reach, above the same phase with a model of no size.

`make test-memory` measures all cells, `make test` one.
"""

import json
from dataclasses import dataclass, field
from itertools import islice, permutations
from pathlib import Path
from typing import Any

import pytest
from measured_memory import prepared_process, reached

from trainers.phases import phase_type
from trainers.sizing.memory import Memory, Place
from trainers.sizing.phases import phase_needs
from trainers.sizing.shapes import ModelShape, shape_of

WITHIN = 0.2
"""Share of the measured peak that a plan may be off by."""

LENGTH, PASS = 64, 512
"""Tokens of a sequence, and of a forward pass."""
SMALL = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 32}
"""Of no size, but wide enough for weights in 4 bits."""
LARGE = {
    "hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 8, "vocab_size": 8192, "head_dim": 64,
    "num_key_value_heads": 2,
}  # fmt: skip

LORA = {"lora": {"rank": 8}}
QLORA = {"lora": {"rank": 8, "quantization": "nf4"}}
CHECKPOINTING = {"gradientCheckpointing": True}
BF16 = {"precision": "bf16"}
FSDP = {"strategy": "fsdp"}
REPLICATED, SHARDED, OFFLOADED = ({"frozen": how} for how in ("replicated", "sharded", "offloaded"))
LIVE_REFERENCE = {"referenceScores": "on-the-fly"}
HALF = {"dtype": "bf16", "optim": {"stateDtype": "bf16"}}
TRAINING = ("sft", "reward", "dpo", "ppo", "distill")


def zero(stage: int, **settings: Any) -> dict[str, Any]:
    return {"strategy": "deepspeed", "deepspeed": {"stage": stage, **settings}}


@dataclass(frozen=True)
class Cell:
    kind: str
    processes: int = 1
    parallel: dict[str, Any] = field(default_factory=dict)
    more: dict[str, Any] = field(default_factory=dict)
    """Other settings of the phase."""
    buckets: dict[str, int] = field(default_factory=dict)
    """Of a DeepSpeed JSON file."""

    def __str__(self) -> str:
        strategy = self.parallel.get("strategy", "single" if self.processes == 1 else "ddp")
        settings = [f"{name}={value}" for name, value in self.parallel.items() if name != "strategy"]
        more = ["qlora" if value is QLORA["lora"] else name for name, value in self.more.items()]
        return "-".join([self.kind, f"{strategy}x{self.processes}", *settings, *more, *self.buckets])


SETTINGS: list[tuple[int, dict[str, Any], dict[str, Any]]] = [
    (1, {}, {}),
    (1, CHECKPOINTING, {}),
    (1, {}, LORA),
    (2, {}, {}),
    (2, FSDP, {}),
    (2, FSDP | CHECKPOINTING, {}),
    (2, FSDP, LORA),
    (2, zero(3), {}),
]
"""Processes, how they share the work, and what is trained."""
CELLS = [
    *(Cell(kind, *setting) for setting in SETTINGS for kind in TRAINING),
    *(Cell("sft", 2, zero(stage)) for stage in (1, 2)),
    Cell("sft", 2, zero(2, offloadOptimizer=True)),
    Cell("sft", 2, zero(3, offloadOptimizer=True, offloadParameters=True)),
    *(Cell("sft", 2, zero(stage), LORA) for stage in (2, 3)),
    *(Cell(kind, 1, {}, QLORA) for kind in ("sft", "dpo")),
    Cell("sft", 2, {}, QLORA),
    Cell("sft", 1, BF16, QLORA),
    Cell("sft", 2, zero(2), buckets={"reduce_bucket_size": 10**6, "allgather_bucket_size": 10**6}),
    Cell(
        "sft", 2, zero(3),
        buckets=dict.fromkeys(
            ("stage3_max_live_parameters", "stage3_max_reuse_distance", "stage3_prefetch_bucket_size"), 10**6
        ),
    ),
    Cell("sft", 2, FSDP | {"fsdp": {"cpuOffload": True}}),
    Cell("sft", 2, FSDP | {"fsdp": {"reshardAfterForward": False}}),
    Cell("sft", 1, BF16),
    Cell("sft", 1, BF16, HALF),
    Cell("sft", 1, BF16 | CHECKPOINTING),
    Cell("sft", 1, BF16 | CHECKPOINTING, HALF),
    Cell("dpo", 1, BF16 | CHECKPOINTING, LORA),
    *(Cell(kind, 2, BF16 | FSDP) for kind in ("sft", "ppo")),
    Cell("sft", 2, BF16 | zero(2), HALF),
    Cell("distill", 1, BF16),
    Cell("dpo", 1, {}, LIVE_REFERENCE),
    Cell("dpo", 2, FSDP | REPLICATED, LIVE_REFERENCE),
    Cell("dpo", 2, SHARDED, LIVE_REFERENCE),
    Cell("distill", 2, FSDP | REPLICATED),
    Cell("distill", 2, OFFLOADED),
    Cell("rollout"),
    Cell("rollout", 2, SHARDED),
    Cell("evaluate"),
    Cell("evaluate", 2, OFFLOADED),
]  # fmt: skip
ALWAYS = [Cell("sft")]


@pytest.fixture(scope="session", autouse=True)
def _prepared():
    with prepared_process():
        yield


@pytest.fixture(scope="session")
def models(tiny_model_dir, tmp_path_factory) -> dict[str, Path]:
    """By `size` and `size-reward`; a small model and one whose parameters and activations are no noise."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    found = {}
    for size, changes in (("small", SMALL), ("large", LARGE)):
        config = AutoConfig.from_pretrained(tiny_model_dir, num_labels=1, **changes)
        for name, auto in ((size, AutoModelForCausalLM), (f"{size}-reward", AutoModelForSequenceClassification)):
            found[name] = tmp_path_factory.mktemp(name)
            auto.from_config(config).save_pretrained(found[name])
            tokenizer.save_pretrained(found[name])
    return found


@pytest.fixture(scope="session")
def rows(tmp_path_factory) -> dict[str, str]:
    """Files of rows whose sequences all have the same length: what is too long loses the left end of its prompt.

    Prompts that are answered differ from their beginning on: what is alike is read once.
    """
    letters = [" ".join(some) for some in islice(permutations("ABCDEFGH", 3), 64)]
    prompt, answers = "copy A B C " * 8, ["A B C D " * 11, "B C D E " * 11]
    kinds = {
        "sft": {"prompt": prompt, "response": answers[0]},
        "pairs": {"prompt": prompt, "chosen": answers[0], "rejected": answers[1]},
        "traces": {"prompt": "copy A B C", "teacher_response": "A B C D " * 13, "reward": 1.0},
    }
    folder = tmp_path_factory.mktemp("rows")
    for name, row in kinds.items():
        (folder / f"{name}.jsonl").write_text(f"{json.dumps(row)}\n" * 64)
    for name, times in (("prompts", 8), ("long", 62)):
        lines = [json.dumps({"prompt": f"copy {some} " * times}) for some in letters]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    return {name: str(folder / f"{name}.jsonl") for name in [*kinds, "prompts", "long"]}


def spec_of(cell: Cell, models: dict[str, Path], rows: dict[str, str], size: str) -> dict[str, Any]:
    """Two steps of two passes: moments are there from the second step on, and gradients from a step's second pass on."""
    model, reward = {"source": str(models[size])}, {"source": str(models[f"{size}-reward"])}
    sequences = 2 * cell.processes * PASS // LENGTH
    more = dict(cell.more)
    trained = model | ({"dtype": dtype} if (dtype := more.pop("dtype", None)) else {})
    parallel = {"parallel": {"microBatchTokens": PASS, **cell.parallel}}
    common = parallel | {
        "checkpoint": {"everySeconds": None, "timeShare": None},  # a busy machine may take a minute for a step
        "batchSize": sequences // 2 if cell.kind in ("reward", "dpo") else sequences,
        **more,
    }  # fmt: skip
    steps, sampling = {"duration": {"maxSteps": 2}}, {"sampling": {"maxNewTokens": 24}}
    prompts = {"prompts": [{"files": rows["prompts"]}], "maxPromptLength": LENGTH}
    data = {name: {"train": [{"files": rows[name]}], "maxLength": LENGTH} for name in ("sft", "pairs")}
    # A few tokens more after long prompts: the cache is large, and takes little time. What is beneath answers one at a
    # time: sixteen's keys, values and passes are 27 MiB of a model of no size, too.
    speaking = {"sampling": {"maxNewTokens": 8, "batchSize": 16 if size == "large" else 1}}
    long = {"maxPromptLength": 256}
    benchmarks = {
        "data": {"rows": [{"files": rows["long"]}], **long},
        "benchmarks": [{"name": "length", "length": {}}],
        "latency": {"enabled": False},
    }
    return {
        "sft": common | {"model": trained, "data": data["sft"], **steps},
        "reward": common | {"model": trained, "data": data["pairs"], **steps},
        "dpo": common | {"policy": trained, "data": data["pairs"], **steps},
        "ppo": common | {
            "policy": trained, "rewardModel": reward, "data": prompts, "iterations": 2, "ppoEpochs": 1, **sampling,
        },
        "distill": common | {
            "teacher": model, "student": trained, "traces": {"files": rows["traces"]}, "onPolicyFraction": 0,
            "maxLength": LENGTH, **steps,
        },
        "rollout": parallel | {"policy": model, "data": {"prompts": [{"files": rows["long"]}], **long}, **speaking},
        "evaluate": parallel | {"models": [{"name": "one", **model}], **benchmarks, **speaking},
    }[cell.kind]  # fmt: skip


def with_buckets(cell: Cell, spec: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The phase with a DeepSpeed JSON file, if the cell has one."""
    if not cell.buckets:
        return spec
    file = folder / "deepspeed.json"
    file.write_text(json.dumps({"zero_optimization": cell.buckets}))
    zero = spec["parallel"]["deepspeed"] | {"config": str(file)}
    return spec | {"parallel": spec["parallel"] | {"deepspeed": zero}}


def planned(cell: Cell, spec: dict[str, Any]) -> Memory:
    def shape(ref) -> ModelShape:
        return shape_of(json.loads((Path(ref.source) / "config.json").read_text()))

    parsed = phase_type(cell.kind).spec.model_validate(spec)
    bf16 = parsed.parallel.precision == "bf16"
    needs = phase_needs(
        parsed, Place(parsed.parallel, procs_per_node=cell.processes, bf16=bf16, zero=cell.buckets), shape
    )
    assert needs is not None
    return needs.memory


@pytest.fixture(scope="session")
def baselines(models, rows, tmp_path_factory):
    """What a phase of the same settings reaches with a model of no size, however it is spread but for DeepSpeed's imports.

    Arithmetic in bf16 and weights in bf16 come with kernels of their own, which are made where they are first called: 17
    and 25 MiB of the process.
    """
    found: dict[str, int] = {}

    def baseline(cell: Cell) -> int:
        deepspeed, bf16 = cell.parallel.get("strategy") == "deepspeed", cell.parallel.get("precision") == "bf16"
        parallel = (zero(2) if deepspeed else {}) | (BF16 if bf16 else {})
        plain = Cell(cell.kind, cell.processes, parallel, cell.more)
        if str(plain) not in found:
            spec = spec_of(plain, models, rows, "small")
            found[str(plain)] = reached(
                cell.kind, spec, tmp_path_factory.mktemp("base") / "run", cell.processes
            ).settled
        return found[str(plain)]

    return baseline


def check(cell: Cell, models: dict[str, Path], rows: dict[str, str], baselines, folder: Path) -> None:
    spec = with_buckets(cell, spec_of(cell, models, rows, "large"), folder)
    said = planned(cell, spec)
    base = baselines(cell)
    measured = reached(cell.kind, spec, folder / "run", cell.processes).peak - base
    figures = ", ".join(f"{size / 2**20:.0f}" for size in (said.total, measured, base))
    print(f"{cell}: MiB said, measured, beneath: {figures}; {said.total / measured:.2f}", flush=True)
    assert abs(said.total / measured - 1) < WITHIN


@pytest.mark.parametrize("cell", ALWAYS, ids=str)
def test_a_phase_reaches_what_its_plan_says(cell, models, rows, baselines, tmp_path):
    check(cell, models, rows, baselines, tmp_path)


@pytest.mark.memory
@pytest.mark.parametrize("cell", [cell for cell in CELLS if cell not in ALWAYS], ids=str)
def test_every_phase_reaches_what_its_plan_says(cell, models, rows, baselines, tmp_path):
    check(cell, models, rows, baselines, tmp_path)

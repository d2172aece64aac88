"""What is special where weights are split: each is what one process makes of it."""

from pathlib import Path

import pytest
from distributed.agreement import agree
from distributed.cells import SAMPLING, STEPS, WAYS, Way, data, rows
from distributed.conftest import output_of, write
from distributed.processes import run_phases, succeed

pytestmark = pytest.mark.distributed

EXPERTS = "adapters on experts"


@pytest.fixture(scope="module")
def models(tiny_model_dir, tmp_path_factory):
    """Folders: one with a head of its own, one whose embeddings are its head, one with experts beside shared ones."""
    from families.architectures import family_model
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    special = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id, "bos_token_id": None}
    config = AutoConfig.from_pretrained(tiny_model_dir, tie_word_embeddings=True)
    made = {
        "tied": AutoModelForCausalLM.from_config(config),
        "experts": family_model("deepseek_v3", len(tokenizer), **special),
    }
    folders = {name: tmp_path_factory.mktemp(name) for name in made}
    for name, model in made.items():
        model.save_pretrained(folders[name])
        tokenizer.save_pretrained(folders[name])
    return folders | {"plain": tiny_model_dir}


def specs(models: dict[str, Path], traces: Path) -> dict[str, tuple[str, dict]]:
    """Type and spec by name."""
    plain, tied, experts = ({"source": str(models[name])} for name in ("plain", "tied", "experts"))
    # Embeddings of words that no row has get gradients of rounding alone, of which Adam makes steps: small ones, here.
    on_head = {"rank": 4, "targetModules": ["lm_head", "q_proj"]}
    return {
        "the language loss on embeddings that are the head": (
            "reward", {"model": tied, "data": rows("preferences"), "lmWeight": 0.5, **STEPS, "optim": {"lr": 3e-4}},
        ),
        "embeddings that are the head": ("sft", {"model": tied, "data": rows("demonstrations"), **STEPS}),
        "adapters on the head": ("dpo", {"policy": plain, "data": rows("preferences"), "lora": on_head, **STEPS}),
        EXPERTS: ("sft", {"model": experts, "data": rows("demonstrations"), "lora": {"rank": 2}, **STEPS}),
        "traces without their teacher": (
            "distill", {
                "student": plain, "traces": {"files": str(traces)}, "onPolicyFraction": 0, "maxLength": 64, **STEPS,
            },
        ),
    }  # fmt: skip


@pytest.fixture(scope="module")
def run(models, tmp_path_factory):
    """``run(way, left_out) -> {name: the phase's directory}``; the traces are those of the first way."""
    traces = tmp_path_factory.mktemp("traces")
    policy = {"policy": {"source": str(models["tied"])}, "data": {"prompts": [data("prompts", 24)]}}
    rollout = policy | {"sampling": SAMPLING, "teacherTopK": 8, "parallel": {"strategy": "single"}}
    file = write(traces / "rollout.yaml", output_of(traces, "rollout"), rollout)
    succeed(Way({"strategy": "single"}, processes=1), run_phases, [("rollout", file)], log=traces / "log")

    def started(way: Way, left_out: tuple[str, ...] = ()) -> dict[str, Path]:
        folder = tmp_path_factory.mktemp("way")
        wanted = specs(models, output_of(traces, "rollout") / "traces.jsonl")
        wanted = {name: parts for name, parts in wanted.items() if name not in left_out}
        files = []
        for name in wanted:
            kind, spec = wanted[name]
            parts = spec | {"parallel": {"microBatchTokens": 128} | way.parallel}
            files.append((kind, write(folder / f"{name}.yaml", output_of(folder / name, kind), parts)))
        succeed(way, run_phases, files, log=folder / "log")
        return {name: output_of(folder / name, wanted[name][0]) for name in wanted}

    return started


@pytest.fixture(scope="module")
def alone(run):
    return run(Way({"strategy": "single"}, processes=1))


@pytest.mark.parametrize("name", ["ddp", "fsdp", "zero 2", "zero 3"])
def test_what_is_special_is_what_one_process_makes_of_it(name, run, alone):
    for special, found in run(WAYS[name], (EXPERTS,) if name == "zero 3" else ()).items():
        agree(WAYS[name], special, found, alone[special])

"""The shipped runs' plans: what they need is known, is there, and is what docs/scaling.md says."""

from pathlib import Path

import pytest

from controller.api.run import AlignmentRun
from controller.commands.sizes import markdown_lines
from controller.compose import read_document
from controller.plan.shapes import sources
from controller.plan.sizes import run_sizes
from controller.preflight import load_run
from trainers.sizing.memory import NF4

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs/scaling.md"


def _config(
    kind: str, width: int, inner: int, layers: int, heads: int, groups: int, vocabulary: int, tied: bool
) -> dict:
    return {
        "model_type": kind, "hidden_size": width, "intermediate_size": inner, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": groups, "vocab_size": vocabulary,
        "tie_word_embeddings": tied, "max_position_embeddings": 32768,
    }  # fmt: skip


HUB = {
    "Qwen/Qwen2.5-7B-Instruct": _config("qwen2", 3584, 18944, 28, 28, 4, 152064, False),
    "Qwen/Qwen2.5-1.5B-Instruct": _config("qwen2", 1536, 8960, 28, 12, 2, 151936, True),
    "meta-llama/Llama-3.1-70B": _config("llama", 8192, 28672, 80, 64, 8, 128256, False),
}
"""What of the hub's `config.json` counts."""

PLANNED = ("eight-gpus", "multi-node")


def sizes_of(name: str):
    run = load_run(read_document(ROOT / f"configs/examples/{name}.yaml"))
    return run_sizes(run, {(source, revision): HUB[source] for source, revision in sources(run)})


@pytest.mark.parametrize("name", PLANNED)
def test_every_phase_of_a_large_example_fits_its_gpus(name):
    sizes = sizes_of(name)
    assert sizes
    assert {phase: size.fits for phase, size in sizes.items()} == dict.fromkeys(sizes, True)


@pytest.mark.parametrize("name", PLANNED)
def test_the_page_has_the_plan_of_each_large_example(name):
    assert "\n".join(markdown_lines(list(sizes_of(name).values()))) in PAGE.read_text()


BYTES = {
    "weights, trained (`fp32`, the default)": ({}, "weights"),
    "their gradients": ({}, "gradients"),
    "AdamW's two moments": ({}, "optimizer"),
    "weights, not trained: reference, teacher, reward model (`bf16` on GPUs)": (None, "frozen"),
    "weights under adapters (LoRA)": ({"lora": {"rank": 1}}, "weights"),
}
"""Rows of the page's first table: what a training or, for None, a rollout is set, and the part of its memory."""


@pytest.mark.parametrize("held", BYTES)
def test_the_page_says_how_many_bytes_a_parameter_takes(held):
    settings, part = BYTES[held]
    model = {"source": "Qwen/Qwen2.5-1.5B-Instruct"}
    data = [{"synthetic": {"task": "letters", "split": "prompts", "count": 8}}]
    phase = {"sft": {"model": model, "data": {"train": data}, **settings}} if settings is not None else None
    phase = phase or {"rollout": {"policy": model, "data": {"prompts": data}}}
    template = {"nodeSelector": {"nvidia.com/gpu.product": "NVIDIA-H100-80GB-HBM3"}}
    document = {"apiVersion": "alignment.dev/v1alpha1", "kind": "AlignmentRun", "metadata": {"name": "one"}}
    run = AlignmentRun.model_validate(document | {"spec": {"template": template, "phases": [{"name": "one", **phase}]}})
    needs = run_sizes(run, {(source, revision): HUB[source] for source, revision in sources(run)})["one"].needs
    said = round(getattr(needs.memory, part) / needs.models[0][1])
    assert f"| {held} | {said} |" in PAGE.read_text()


def test_the_page_says_how_many_bytes_a_packed_weight_takes():
    assert f"| linear layers under adapters with `quantization: nf4` (QLoRA) | {NF4:.2f} |" in PAGE.read_text()


def test_without_splitting_the_examples_would_not_fit():
    for name, phase in (("eight-gpus", "dpo"), ("multi-node", "sft")):
        document = read_document(ROOT / f"configs/examples/{name}.yaml")
        entry = next(entry for entry in document["spec"]["phases"] if entry["name"] == phase)
        entry[phase]["parallel"] = {"strategy": "ddp", "gradientCheckpointing": True}
        run = load_run(document)
        size = run_sizes(run, {(source, revision): HUB[source] for source, revision in sources(run)})[phase]
        assert size.fits is False
        assert "strategy: fsdp" in size.advice

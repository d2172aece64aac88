"""Low-rank adapters in every training phase, on a base in bf16: what is trained, in which type, and what is left."""

import json
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

LORA = {"rank": 4, "targetModules": ["q_proj", "down_proj"]}
PROMPTS = {"prompts": [{"synthetic": {"task": "letters", "split": "prompts", "count": 16}}]}
SHORT = {"maxNewTokens": 6}


def rows(split: str) -> dict:
    return {"train": [{"synthetic": {"task": "letters", "split": split, "count": 16}}], "maxLength": 64}


def spec_for(kind: str, model: Path, reward_model: Path) -> dict:
    source = {"source": str(model)}
    steps = {"batchSize": 8, "duration": {"maxSteps": 2}}
    specs = {
        "sft": {"model": source, "data": rows("demonstrations"), **steps},
        "reward": {"model": source, "data": rows("preferences"), "lmWeight": 0.1, **steps},
        "dpo": {"policy": source, "data": rows("preferences"), **steps},
        "ppo": {
            "policy": source, "rewardModel": {"source": str(reward_model)}, "data": PROMPTS, "sampling": SHORT,
            "iterations": 2, "batchSize": 8,
        },
        "distill": {
            "teacher": source, "student": {"teacherLayers": [0]}, "prompts": PROMPTS, "onPolicyFraction": 1,
            "sampling": SHORT, "maxLength": 64, **steps,
        },
    }  # fmt: skip
    return specs[kind] | {"lora": LORA, "optim": {"lr": 1e-2}}


@pytest.fixture
def trained(monkeypatch) -> dict[str, torch.dtype]:
    """Type of each parameter that is trained beside adapters, by name; filled when a checkpoint is written."""
    from trainers.core.engines.local_state import LocalState

    found: dict[str, torch.dtype] = {}
    before = LocalState.saved

    def watched(self, moments=True):
        if any("lora_" in name for name in self.named):
            found.update({name: parameter.dtype for name, parameter in self.named.items()})
        return before(self, moments)

    monkeypatch.setattr(LocalState, "saved", watched)
    return found


@pytest.mark.parametrize("kind", ["sft", "reward", "dpo", "ppo", "distill"])
@pytest.mark.parametrize("changes", [{}, {"gradientCheckpointing": True}], ids=["plain", "gradient-checkpointing"])
def test_adapters_alone_are_trained_in_fp32(
    run_phase, tiny_model_dir, tiny_reward_dir, tmp_path, trained, kind, changes
):
    spec = spec_for(kind, tiny_model_dir, tiny_reward_dir) | {"parallel": {"precision": "bf16", **changes}}
    output = tmp_path / "run" / kind
    assert run_phase(kind, spec, None, output)[0] == 0
    head = {name for name in trained if "score" in name}
    assert len(head) == (kind == "reward")
    assert all("lora_" in name and ("q_proj" in name or "down_proj" in name) for name in trained.keys() - head)
    assert set(trained.values()) == {torch.float32}
    before, after = load_file(tiny_model_dir / "model.safetensors"), load_file(output / "model" / "model.safetensors")
    held = {name: tensor.bfloat16() for name, tensor in before.items()}  # as the base is beneath its adapters
    changed = {n for n in after if n in held and not torch.equal(held[n].to(after[n]), after[n])}
    assert changed and all("q_proj" in name or "down_proj" in name for name in changed)
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert all(line["grad_norm"] > 0 for line in lines)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
@pytest.mark.parametrize("adapted", [False, True], ids=["plain", "adapted"])
def test_only_a_head_that_is_no_linear_layer_needs_whole_weights(strategy, adapted):
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    from trainers.contract import BadInput
    from trainers.core.models import check_head
    from trainers.spec import Parallel

    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=11, **sizes))
    parallel = Parallel(strategy=strategy)
    if adapted:
        get_peft_model(model, LoraConfig(target_modules=["lm_head"]))
    check_head(parallel, model)
    model.set_output_embeddings(torch.nn.Sequential(model.get_output_embeddings()))
    with nullcontext() if strategy == "ddp" else pytest.raises(BadInput, match="under strategy fsdp, which splits"):
        check_head(parallel, model)

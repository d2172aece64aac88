"""Low-rank adapters on every family: what is merged and saved has the logits that were trained."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from families.architectures import FAMILIES, family_model
from transformers import AutoModelForCausalLM

from trainers.contract import BadInput
from trainers.core.adapters import linear_names, with_adapters
from trainers.core.export import write_model
from trainers.core.models import LoadedModel, check_adapters
from trainers.spec import DeepSpeed, Lora, Parallel

IDS = torch.arange(1, 13)[None]


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model(input_ids=IDS).logits


def ends(model) -> tuple[str, ...]:
    """Names of a model's head and embeddings."""
    modules = (model.get_output_embeddings(), model.get_input_embeddings())
    return tuple(name.rsplit(".", 1)[-1] for name, m in model.named_modules() if any(m is end for end in modules))


@pytest.mark.parametrize("family", list(FAMILIES))
@pytest.mark.parametrize("of", ["layers", "ends"])
def test_merged_adapters_are_the_trained_ones(family: str, of: str, tmp_path: Path):
    model = family_model(family).eval()
    before = logits(model)
    adapters = with_adapters(model, Lora(rank=2, target_modules=ends(model) if of == "ends" else ()), 0)
    for parameter in adapters.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.2)
    trained = logits(adapters.base_model.model.eval())
    assert (trained - before).abs().max() > 1
    tokenizer = SimpleNamespace(save_pretrained=lambda folder: None, pad_token_id=0)
    loaded = LoadedModel(adapters.base_model.model, tokenizer, SimpleNamespace(stop_ids={2}), adapters)
    write_model(loaded, tmp_path / "model")
    saved = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval())
    assert (saved - trained).abs().max() < 1e-4 * trained.abs().max()


@pytest.mark.parametrize("family", list(FAMILIES))
def test_every_adapter_is_trained(family: str):
    """One that the forward pass goes around would be merged as it was made."""
    model = family_model(family)
    adapters = with_adapters(model, Lora(rank=2), 0)
    for name, parameter in adapters.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    model(input_ids=IDS, labels=IDS).loss.backward()
    idle = [name for name, p in adapters.named_parameters() if "lora_" in name and p.requires_grad and p.grad is None]
    assert idle == []


def test_a_layer_that_is_not_called_is_refused_by_name():
    model = family_model("jamba")
    assert "dt_proj" not in linear_names(model)
    with pytest.raises(BadInput, match="jamba read its weight without calling it"):
        with_adapters(model, Lora(target_modules=("q_proj", "dt_proj")), 0)


@pytest.mark.parametrize("family", ["deepseek_v3", "qwen3_next", "mixtral"])
def test_it_is_said_which_experts_get_adapters(family: str, capsys):
    model = family_model(family)
    with_adapters(model, Lora(rank=2), 0)
    trained = [name for name, _ in model.named_parameters() if ".experts." in name and "lora_" in name]
    said = capsys.readouterr().out
    assert ("get no adapters" in said) == (trained == []) == (family == "mixtral")


def test_under_zeros_third_stage_experts_get_none(capsys):
    adapters = with_adapters(family_model("deepseek_v3"), Lora(rank=2), 0)
    check_adapters(Parallel(strategy="deepspeed", deepspeed=DeepSpeed(stage=2)), adapters)
    with pytest.raises(BadInput, match=r"down_proj.* can have no adapters under ZeRO's stage 3"):
        check_adapters(Parallel(strategy="deepspeed", deepspeed=DeepSpeed(stage=3)), adapters)

"""Sizes that arithmetic gives, against transformers' own models."""

import pytest
import torch
from families.architectures import FAMILIES, family_config
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoModelForSequenceClassification

from trainers.core.adapters import with_adapters
from trainers.sizing.families import DEFAULTS
from trainers.sizing.shapes import UnknownSize, shape_of
from trainers.spec import Lora


def written(kind: str, width: int, inner: int, layers: int, heads: int, groups: int, vocabulary: int, **more) -> dict:
    """What a `config.json` has of these."""
    return {
        "model_type": kind, "hidden_size": width, "intermediate_size": inner, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": groups, "vocab_size": vocabulary, **more,
    }  # fmt: skip


UNTIED, TIED = {"tie_word_embeddings": False}, {"tie_word_embeddings": True}
MOE = {"moe_intermediate_size": 768, "num_experts": 128, "num_experts_per_tok": 8, "head_dim": 128}

PUBLISHED = {
    "Llama-3.1-8B": (8_030_261_248, written("llama", 4096, 14336, 32, 32, 8, 128256, **UNTIED)),
    "Llama-3.1-70B": (70_553_706_496, written("llama", 8192, 28672, 80, 64, 8, 128256, **UNTIED)),
    "Qwen2.5-1.5B": (1_543_714_304, written("qwen2", 1536, 8960, 28, 12, 2, 151936, **TIED)),
    "Qwen3-0.6B": (596_049_920, written("qwen3", 1024, 3072, 28, 16, 8, 151936, head_dim=128, **TIED)),
    "Qwen3-30B-A3B": (30_532_122_624, written("qwen3_moe", 2048, 6144, 48, 32, 4, 151936, **MOE, **UNTIED)),
    "Mixtral-8x7B": (
        46_702_792_704,
        written("mixtral", 4096, 14336, 32, 32, 8, 32000, num_local_experts=8, num_experts_per_tok=2, **UNTIED),
    ),
    # As the hub has it: what is the family's default is left out.
    "gemma-2-2b": (2_614_341_888, written("gemma2", 2304, 9216, 26, 8, 4, 256000, head_dim=256)),
    "gpt2": (124_439_808, {"model_type": "gpt2", "n_embd": 768, "n_layer": 12, "n_head": 12, "vocab_size": 50257}),
}
"""Parameters as their authors state them, and what of their `config.json` counts."""


def on_meta(config, auto=AutoModelForCausalLM):
    with torch.device("meta"):
        return auto.from_config(config, dtype=torch.float32)


def count(model) -> int:
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models_have_their_published_size(name):
    stated, config = PUBLISHED[name]
    assert shape_of(config).parameters == stated


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_counts_as_transformers_builds_it(family):
    config = family_config(family, 61)
    model, shape = on_meta(config), shape_of(config.to_dict())
    assert shape.parameters == count(model)
    assert shape.embedding == model.get_input_embeddings().weight.numel()
    assert shape.tied == (model.get_output_embeddings().weight is model.get_input_embeddings().weight)
    assert len(shape.layers) == model.config.num_hidden_layers


OTHERS = {
    "llama": {"attention_bias": True, "mlp_bias": True},
    "qwen3_moe": {"mlp_only_layers": [0]},
    "cohere": {"use_qk_norm": True},
    "deepseek_v3": {"q_lora_rank": None, "attention_bias": True},
    "falcon_h1": {"mamba_rms_norm": True},
    "jamba": {"num_experts": 1},
    "zamba2": {
        "num_hidden_layers": 5, "num_mem_blocks": 2, "use_shared_attention_adapter": True,
        "layers_block_type": ["hybrid", "mamba", "hybrid", "hybrid", "mamba"],
    },
    "lfm2": {"conv_bias": True},
    "gpt2": {"n_inner": None, "tie_word_embeddings": False},
}  # fmt: skip


@pytest.mark.parametrize("family", OTHERS)
def test_settings_that_change_what_there_is(family):
    config = family_config(family, 61, **OTHERS[family])
    assert shape_of(config.to_dict()).parameters == count(on_meta(config))


# peft gives the stacked experts of these adapters too, by the names of their shared experts' layers.
@pytest.mark.parametrize("family", [f for f in FAMILIES if f not in ("deepseek_v3", "qwen3_next")])
def test_adapters_count_as_peft_makes_them(family):
    config = family_config(family, 61)
    adapters = with_adapters(on_meta(config), Lora(rank=3), 0)
    trained = sum(p.numel() for p in adapters.parameters() if p.requires_grad)
    assert shape_of(config.to_dict()).adapters(Lora(rank=3)) == trained


def test_adapters_of_named_layers():
    config = family_config("llama", 61)
    lora = Lora(rank=2, target_modules=("q_proj", "v_proj"))
    trained = sum(p.numel() for p in with_adapters(on_meta(config), lora, 0).parameters() if p.requires_grad)
    assert shape_of(config.to_dict()).adapters(lora) == trained


def test_a_classifier_has_a_score_in_place_of_a_head():
    config = family_config("llama", 61, num_labels=1)
    model = on_meta(config, AutoModelForSequenceClassification)
    shape = shape_of({**config.to_dict(), "architectures": ["LlamaForSequenceClassification"]})
    assert shape.parameters == count(model)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_a_config_leaves_out_means_what_transformers_takes_it_to_mean(family):
    """The hub's files leave out what is their family's default, or have been written by older versions."""
    own = CONFIG_MAPPING[family]()
    for key, value in {"tie_word_embeddings": False, **DEFAULTS.get(family, {})}.items():
        if value is not None:
            assert getattr(own, key) == value, key


def test_the_text_part_of_a_model_of_several():
    text = family_config("llama", 61).to_dict()
    assert shape_of({"model_type": "mllama", "text_config": text}).parameters == shape_of(text).parameters


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"model_type": "strange"}, "models of type strange"),
        ({}, "models of type None"),
        ({"model_type": "llama", "hidden_size": 8}, "config.json lacks"),
        (
            {"model_type": "llama", "hidden_size": "eight", "num_attention_heads": 2, "vocab_size": 3},
            "config.json lacks",
        ),
    ],
)
def test_what_cannot_be_told_is_said(config, said):
    with pytest.raises(UnknownSize, match=said):
        shape_of(config)

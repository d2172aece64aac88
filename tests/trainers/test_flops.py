"""The cost of a model's passes against what torch counts while they happen."""

from dataclasses import replace

import pytest
import torch
from families.architectures import family_config
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GPT2Config,
    LlamaConfig,
    MixtralConfig,
)

from trainers.core.device import PEAK_FLOPS, peak_flops
from trainers.core.flops import ModelFlops, model_flops

LENGTH = 24
SMALL = {"vocab_size": 96, "max_position_embeddings": 64}
LLAMA = LlamaConfig(
    hidden_size=32, intermediate_size=80, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, **SMALL
)
CONFIGS = {
    "llama": LLAMA,
    "tied": LlamaConfig(**{**LLAMA.to_dict(), "tie_word_embeddings": True}),
    "wide heads": LlamaConfig(**{**LLAMA.to_dict(), "head_dim": 16}),
    "gpt2": GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=96, n_positions=64),
}


WIDE = {"sliding_window": 64}
"""No shorter than what is counted here."""
FAMILIES = {
    name: family_config(name, 96, **changes)
    for name, changes in {
        "qwen3": {}, "phi3": WIDE, "gemma2": WIDE, "mistral": WIDE, "deepseek_v3": {}, "qwen3_moe": {},
        "gpt_neox": {}, "gpt_oss": WIDE,
    }.items()
}  # fmt: skip
CONFIGS |= FAMILIES


def counted(model: torch.nn.Module, backward: bool) -> int:
    """By torch. It counts the whole square of the attention, we what a causal model needs of it."""
    ids = torch.arange(LENGTH)[None] % 96
    with FlopCounterMode(display=False) as counter:
        out = model(input_ids=ids, use_cache=False).logits
        if backward:
            out.sum().backward()
    return counter.get_total_flops()


def square(flops: ModelFlops, passes: int) -> int:
    """What torch counts above ours: the half of the attention's square that causal models mask, less the diagonal."""
    return passes * 2 * (flops.attention + flops.windowed) * (LENGTH * LENGTH - LENGTH)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("backward", [False, True])
def test_as_torch_counts_them(name, backward):
    # Experts one after the other: torch does not count their grouped product.
    plain = {"attn_implementation": "eager", "experts_implementation": "eager"}
    model = AutoModelForCausalLM.from_config(CONFIGS[name], **plain).eval()
    flops = model_flops(model)
    ours = (flops.training if backward else flops.forward)([LENGTH], LENGTH)
    theirs = counted(model, backward) - square(flops, 3 if backward else 1)
    assert ours == theirs


@pytest.mark.parametrize(("length", "window"), [(7, 3), (3, 7), (5, 5), (9, 1)])
def test_a_window_is_seen_and_nothing_else(length, window):
    flops = ModelFlops(body=0, head=0, trained=1.0, attention=0, windowed=10, window=window)
    pairs = sum(query - window < key <= query for query in range(length) for key in range(length))
    assert flops.forward([length], 0) == 2 * 2 * 10 * pairs


@pytest.mark.parametrize(
    ("name", "attending", "windowed"),
    [("qwen3_next", 1, 0), ("lfm2", 1, 0), ("bamba", 1, 0), ("jamba", 1, 0), ("falcon_h1", 2, 0), ("zamba2", 1, 0),
     ("mamba", 0, 0), ("mamba2", 0, 0), ("gemma3_text", 1, 1), ("gpt_oss", 1, 1), ("mistral", 0, 2)],
)  # fmt: skip
def test_only_layers_that_attend_count_as_attention(name, attending, windowed):
    config = family_config(name, 96)
    flops = model_flops(AutoModelForCausalLM.from_config(config))
    width = getattr(config, "num_attention_heads", 0) * (getattr(config, "head_dim", None) or 8)
    assert (flops.attention, flops.windowed) == (attending * width, windowed * width)


def test_the_head_is_for_scored_positions_alone():
    flops = model_flops(AutoModelForCausalLM.from_config(LLAMA))
    assert flops.forward([LENGTH], LENGTH) - flops.forward([LENGTH], 5) == 2 * 96 * 32 * (LENGTH - 5)


def test_frozen_weights_need_no_gradients():
    model = AutoModelForCausalLM.from_config(LLAMA)
    whole = model_flops(model)
    for name, weight in model.named_parameters():
        weight.requires_grad_("q_proj" in name)
    part = model_flops(model)
    assert part == replace(whole, trained=part.trained)
    per_token = 2 * (whole.body + whole.head)
    saved = whole.training([1], 1) - part.training([1], 1)
    assert saved == pytest.approx(per_token - 2 * 3 * 32 * 32)


def test_a_classifier_has_no_head_of_the_vocabulary():
    model = AutoModelForSequenceClassification.from_config(LlamaConfig(**{**LLAMA.to_dict(), "num_labels": 1}))
    flops = model_flops(model)
    assert flops.head == 0
    assert flops.body == model_flops(AutoModelForCausalLM.from_config(LLAMA)).body + 32


def test_a_token_visits_some_experts_only():
    sizes = {"hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = MixtralConfig(**sizes, **SMALL, num_key_value_heads=4, num_local_experts=8, num_experts_per_tok=2)
    flops = model_flops(AutoModelForCausalLM.from_config(config))
    expert = 3 * 32 * 40
    assert flops.body == 2 * (4 * 32 * 32 + 2 * expert + 8 * 32)


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA H100 PCIe", 756e12), ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA A10", 125e12), ("NVIDIA A10G", 70e12), ("Tesla V100-SXM2-16GB", 125e12), ("NVIDIA L4", 121e12),
        ("NVIDIA L40S", 362e12), ("NVIDIA RTX A6000", 154.8e12), ("NVIDIA GeForce RTX 4090", 165.2e12),
        ("AMD Instinct MI300X", 1307e12), ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None), ("cpu", None),
        ("NVIDIA GeForce GTX 1080", None),
    ],
)  # fmt: skip
def test_peaks_are_found_by_the_names_that_drivers_give(name, peak):
    assert peak_flops(name) == peak


def test_a_name_that_another_one_holds_comes_after_it():
    names = list(PEAK_FLOPS)
    for i, name in enumerate(names):
        assert not any(set(earlier.split()) < set(name.split()) for earlier in names[:i])

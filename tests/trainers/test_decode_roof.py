"""The paper calculation of an H100's roof, by hand and against transformers' own shapes."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from torch.nn.functional import rms_norm
from transformers import LlamaConfig, LlamaForCausalLM

from trainers.core.lean import _normed

SCRIPT = Path(__file__).parents[2] / "benchmarks/decode_roof.py"
found = importlib.util.spec_from_file_location("decode_roof", SCRIPT)
decode_roof = sys.modules["decode_roof"] = importlib.util.module_from_spec(found)  # where its dataclasses look
found.loader.exec_module(decode_roof)
SHAPES, Shape = decode_roof.SHAPES, decode_roof.Shape
BANDWIDTH, REACHED = decode_roof.BANDWIDTH, decode_roof.REACHED
allowed, costs, ours, roof, step = (getattr(decode_roof, name) for name in ("allowed", "costs", "ours", "roof", "step"))


@pytest.mark.parametrize("shape", SHAPES, ids=[shape.name for shape in SHAPES])
def test_weights_are_those_of_the_model_but_for_its_embeddings(shape):
    config = LlamaConfig(
        vocab_size=shape.vocabulary, hidden_size=shape.hidden, intermediate_size=shape.inner,
        num_hidden_layers=shape.layers, num_attention_heads=shape.heads, num_key_value_heads=shape.keys,
        tie_word_embeddings=False,
    )  # fmt: skip
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    read = sum(p.numel() for name, p in model.named_parameters() if "embed_tokens" not in name)
    assert shape.weights() == 2 * read


def test_a_step_is_its_bytes_and_its_launches():
    """One layer of width 8 with 2 heads, one of keys: 4 x 8 x 8 less half of two, 3 x 8 x 16, two norms; 10 tokens known."""
    shape = Shape("small", 8, 16, 1, 2, 1, 10)
    weights = 2 * (8 * 8 * 2 + 8 * 4 * 2 + 3 * 8 * 16 + 2 * 8 + 80 + 8)
    assert shape.weights() == weights
    assert shape.cache(5) == 5 * 2 * 4 * 2
    read = weights + 3 * shape.cache(5)
    assert roof(shape, 3, 5) == read / BANDWIDTH
    found = step(shape, 3, 5, 7, (1.0, 0.25))
    assert found.eager == 7.0
    assert found.graphs == pytest.approx((read + 3 * 10 * 36) / (BANDWIDTH * REACHED) + 7 * 0.25)
    spare = step(shape, 3, 5, 7, (0.0, allowed(shape, 3, 5, 7)))
    assert spare.roof / spare.graphs == pytest.approx(0.6)


def test_the_costs_give_the_measurement_back():
    """Qwen2.5 7B: 0.27 of the roof, 1.259 times as fast with graphs."""
    eager, graphs = (cost * 1000 for cost in costs(1000))
    floor = roof(decode_roof.THEIRS, 1, 2048)
    assert floor / eager == pytest.approx(0.27)
    assert eager / (graphs + floor / REACHED) == pytest.approx(1.259)


def test_launches_are_of_layers_and_a_few_more():
    """Few, and in equal steps: what a layer launches by hand is seven products, and no more than thrice as many others."""
    one, two, four = ours(1), ours(2), ours(4)
    assert four - two == 2 * (two - one)
    assert 7 < two - one <= 24
    assert one - (two - one) < 90


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_norms_of_halves_are_transformers_own_to_the_last_bit(dtype):
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    random = torch.Generator().manual_seed(0)
    norm = LlamaRMSNorm(96).to(dtype)
    norm.weight.data = torch.randn(96, generator=random).to(dtype)
    hidden = (3 * torch.randn(500, 96, generator=random)).to(dtype)
    assert torch.equal(_normed(norm, hidden), norm(hidden))
    wrong = rms_norm(hidden, (96,), norm.weight, norm.variance_epsilon)
    assert not torch.equal(wrong, norm(hidden)), "with the weight inside it is rounded once less"

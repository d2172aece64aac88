"""Caches of transformers from which rows are taken when they end, and those that are refused."""

import re
from pathlib import Path

import pytest
import torch
import transformers
from families.architectures import SIZES
from transformers import AutoConfig, AutoModelForCausalLM

from trainers.contract import BadInput
from trainers.core.generate import generate
from trainers.spec import Sampling

EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8}
OWN = {
    "minimax": {**EXPERTS, "block_size": 4, "layer_types": ["linear_attention", "full_attention"]},
    "deepseek_v4": {
        **EXPERTS, "head_dim": 16, "n_routed_experts": 4, "moe_intermediate_size": 16, "sliding_window": 6,
        "layer_types": ["compressed_sparse_attention", "heavily_compressed_attention"],
        "compress_rates": {"compressed_sparse_attention": 2, "heavily_compressed_attention": 4},
    },
}  # fmt: skip


@pytest.mark.parametrize(("kind", "cache"), [("minimax", "MiniMaxCache"), ("deepseek_v4", "DeepseekV4CSACache")])
def test_a_cache_of_an_architectures_own_is_refused_by_name(kind, cache):
    """MiniMax's has states beside its layers, which stay behind when a row ends; the other compresses the padding too."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**SIZES, **OWN[kind]}, vocab_size=61)).eval()
    with pytest.raises(BadInput, match=f"{kind} cannot generate: {cache}, a cache of their own"):
        generate(model, [[5, 6], [7]], Sampling(temperature=0, max_new_tokens=4), frozenset())


def test_no_other_architecture_has_a_cache_of_its_own():
    """A list of those that were tried: another one in a newer transformers is refused until somebody looks."""
    models = Path(transformers.__file__).parent / "models"
    pattern = re.compile(r"^class (\w+)\((?:Cache|Dynamic\w*|CacheLayerMixin|LinearAttention\w*Layer)\):", re.MULTILINE)
    found = {name for path in models.glob("*/modeling_*.py") for name in pattern.findall(path.read_text())}
    found = {name for name in found if "Cache" in name}
    assert found == {"MiniMaxCache", "DeepseekV4HCACache", "MiniMaxM3VLSparseCacheLayer"}

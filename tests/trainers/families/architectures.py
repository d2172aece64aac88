"""Real architectures, tiny, with random weights: what users bring, as transformers builds it.

A family is a transformers model type and the settings that make it small while everything that makes it special stays:
windows shorter than the sequences, several experts, both kinds of a hybrid's layers.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from trainers.core.batch import Sequence

SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
}
MOE: dict[str, Any] = {"num_experts_per_tok": 2, "moe_intermediate_size": 24, "router_aux_loss_coef": 0.05}
MAMBA: dict[str, Any] = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_chunk_size": 8}
LINEAR: dict[str, Any] = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": 6},
    "qwen2": {},
    "qwen3": {"head_dim": 8, "tie_word_embeddings": True},
    "qwen3_moe": {**MOE, "head_dim": 8, "num_experts": 4, "output_router_logits": True, "norm_topk_prob": True},
    "mixtral": {
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "router_aux_loss_coef": 0.05,
        "output_router_logits": True,
    },
    "gemma2": {"head_dim": 8, "sliding_window": 6, "final_logit_softcapping": 3.0, "query_pre_attn_scalar": 8},
    "gemma3_text": {"head_dim": 8, "sliding_window": 6, "sliding_window_pattern": 2, "query_pre_attn_scalar": 8},
    "phi3": {"sliding_window": 6},
    "olmo2": {},
    "gpt_oss": {
        **{k: v for k, v in MOE.items() if k != "moe_intermediate_size"},
        "head_dim": 8,
        "num_local_experts": 4,
        "sliding_window": 6,
        "output_router_logits": True,
    },
    "deepseek_v3": {
        "moe_intermediate_size": 24,
        "num_key_value_heads": 4,
        "n_routed_experts": 4,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
        "n_group": 2,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 8,
        "v_head_dim": 8,
    },
    "gpt2": {"n_positions": 128, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_inner": 48},
    "gpt_neox": {"rotary_pct": 0.5},
    "cohere": {"logit_scale": 0.5},
    "granite": {"logits_scaling": 3.0},
    "qwen3_next": {
        **MOE,
        **LINEAR,
        "head_dim": 8,
        "num_experts": 4,
        "shared_expert_intermediate_size": 24,
        "layer_types": ["linear_attention", "full_attention"],
        "output_router_logits": True,
    },
    "lfm2": {"layer_types": ["conv", "full_attention"], "block_multiple_of": 8},
    "bamba": {**MAMBA, "attn_layer_indices": [1]},
    "falcon_h1": {**MAMBA, "lm_head_multiplier": 0.5, "mamba_d_ssm": 64, "head_dim": 8},
    "jamba": {
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "use_mamba_kernels": False,
        "mamba_dt_rank": 4,
        "mamba_d_state": 8,
        "output_router_logits": True,
    },
    "zamba2": {
        "num_hidden_layers": 3,
        "layers_block_type": ["mamba", "hybrid", "mamba"],
        "num_mem_blocks": 1,
        "n_mamba_heads": 4,
        "mamba_headdim": 16,
        "mamba_d_state": 8,
        "chunk_size": 8,
        "use_mamba_kernels": False,
    },
    "mamba": {"num_hidden_layers": 2, "state_size": 8},
    "mamba2": {"num_hidden_layers": 2, "state_size": 8, "num_heads": 4, "head_dim": 16, "n_groups": 1, "chunk_size": 8},
}


def documented() -> dict[str, dict[str, str]]:
    """The table of docs/families.md: by family what each column says."""
    page = Path(__file__).parents[3] / "docs" / "families.md"
    rows = [line.strip("| \n").split(" | ") for line in page.read_text().splitlines() if line.startswith("| ")]
    (_, *columns), _, *lines = rows
    return {family: dict(zip(columns, cells, strict=True)) for family, *cells in lines}


def sequences() -> list[Sequence]:
    """Of several lengths, the longest longer than the families' windows; each but its first third scored."""
    generator = np.random.default_rng(0)
    return [Sequence(generator.integers(3, 61, n), np.arange(n) > n // 3) for n in (11, 7, 19, 3)]


def family_config(name: str, vocabulary: int, **changes: Any) -> Any:
    from transformers import AutoConfig

    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    settings = {**SIZES, "vocab_size": vocabulary, **special, **FAMILIES[name], **changes}
    if name == "gpt2":
        settings = {k: v for k, v in settings.items() if k not in SIZES} | {"initializer_range": 0.2}
    return AutoConfig.for_model(name, **settings)


def family_model(name: str, vocabulary: int = 61, seed: int = 0, **changes: Any) -> Any:
    """A causal language model of the family with weights large enough to make its parts matter."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(family_config(name, vocabulary, **changes), dtype=torch.float32)

"""Decoder layers by model type: what `config.json` alone says of an architecture's weights.

Each function gives the layers of a model, first to last. A test compares them with transformers' own models.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from trainers.sizing.parts import (
    Part,
    Settings,
    attention,
    experts,
    feed_forward,
    head_norms,
    layer_norm,
    linear,
    norm,
)

Layers = list[Part]

READ_DIRECTLY = {
    "falcon_h1": ("out_proj",),
    "jamba": ("dt_proj", "x_proj"),
    "mamba": ("dt_proj", "out_proj", "x_proj"),
    "mamba2": ("out_proj",),
}
"""Layers of model types that read their weight without calling the layer: an adapter would be merged and never trained."""

STATE_SPACE = ("qwen3_next", "lfm2", "bamba", "falcon_h1", "jamba", "zamba2", "mamba", "mamba2")
"""Types with layers that keep what their kernels choose to, which no arithmetic tells."""


def _llama(c: Settings) -> Layers:
    bias, mlp_bias = c.get("attention_bias", False), c.get("mlp_bias", False)
    width = c["hidden_size"]
    layer = attention(c, bias, bias) + feed_forward(width, c["intermediate_size"], mlp_bias) + norm(width) + norm(width)
    return [layer] * c["num_hidden_layers"]


def _qwen2(c: Settings) -> Layers:
    width = c["hidden_size"]
    layer = attention(c, qkv_bias=True) + feed_forward(width, c["intermediate_size"]) + norm(width) + norm(width)
    return [layer] * c["num_hidden_layers"]


def _qwen3(c: Settings) -> Layers:
    return [layer + head_norms(c) for layer in _llama(c)]


def _qwen3_moe(c: Settings) -> Layers:
    width, every, plain = c["hidden_size"], c.get("decoder_sparse_step", 1), c.get("mlp_only_layers") or ()
    count = c.get("num_experts") or c["num_local_experts"]
    bias = c.get("attention_bias", False)
    rest = attention(c, bias, bias) + head_norms(c) + norm(width) + norm(width)
    sparse = experts(width, c["moe_intermediate_size"], count, c["num_experts_per_tok"])
    dense = feed_forward(width, c["intermediate_size"])
    kinds = (i not in plain and (i + 1) % every == 0 for i in range(c["num_hidden_layers"]))
    return [rest + (sparse if is_sparse else dense) for is_sparse in kinds]


def _mixtral(c: Settings) -> Layers:
    width = c["hidden_size"]
    sparse = experts(width, c["intermediate_size"], c["num_local_experts"], c["num_experts_per_tok"])
    return [attention(c) + sparse + norm(width) + norm(width)] * c["num_hidden_layers"]


def _gemma2(c: Settings) -> Layers:
    """Attention is written out, because scores are capped."""
    width, bias = c["hidden_size"], c.get("attention_bias", False)
    four = norm(width) + norm(width) + norm(width) + norm(width)
    written_out = Part(pairs=2 * c["num_attention_heads"])
    layer = attention(c, bias, bias) + feed_forward(width, c["intermediate_size"]) + four + written_out
    return [layer] * c["num_hidden_layers"]


def _gemma3(c: Settings) -> Layers:
    width, bias = c["hidden_size"], c.get("attention_bias", False)
    four = norm(width) + norm(width) + norm(width) + norm(width)
    layer = attention(c, bias, bias) + head_norms(c) + feed_forward(width, c["intermediate_size"]) + four
    return [layer] * c["num_hidden_layers"]


def _phi3(c: Settings) -> Layers:
    """Queries, keys and values come of one matrix, gate and up of another."""
    width, inner = c["hidden_size"], c["intermediate_size"]
    apart = attention(c) + feed_forward(width, inner) + norm(width) + norm(width)
    (_, _, all_heads), (_, _, groups) = apart.linears[:2]
    linears = (
        ("qkv_proj", width, all_heads + 2 * groups),
        ("o_proj", all_heads, width),
        ("gate_up_proj", width, 2 * inner),
        ("down_proj", inner, width),
    )
    layer = replace(apart, linears=linears)
    return [layer] * c["num_hidden_layers"]


def _olmo2(c: Settings) -> Layers:
    """Norms come after the blocks, and over all heads at once before attention."""
    width, bias = c["hidden_size"], c.get("attention_bias", False)
    size = c.get("head_dim") or width // c["num_attention_heads"]
    over_heads = norm(size * c["num_attention_heads"]) + norm(size * c["num_key_value_heads"])
    layer = attention(c, bias, bias) + over_heads + feed_forward(width, c["intermediate_size"])
    return [layer + norm(width) + norm(width)] * c["num_hidden_layers"]


def _gpt_oss(c: Settings) -> Layers:
    """Attention has sinks, a learned score for each head, and is written out."""
    width, heads, bias = c["hidden_size"], c["num_attention_heads"], c.get("attention_bias", True)
    sinks = Part(other=heads, pairs=heads)
    count, used = c["num_local_experts"], c["num_experts_per_tok"]
    sparse = experts(width, c["intermediate_size"], count, used, bias=True, steps=7)
    return [attention(c, bias, bias) + sinks + sparse + norm(width) + norm(width)] * c["num_hidden_layers"]


def _deepseek_v3(c: Settings) -> Layers:
    width, first = c["hidden_size"], c.get("first_k_dense_replace", 3)
    rest = _latent_attention(c) + norm(width) + norm(width)
    sparse = experts(width, c["moe_intermediate_size"], c["n_routed_experts"], c["num_experts_per_tok"])
    sparse += feed_forward(width, c["moe_intermediate_size"] * c["n_shared_experts"])
    dense = feed_forward(width, c["intermediate_size"])
    return [rest + (dense if i < first else sparse) for i in range(c["num_hidden_layers"])]


def _latent_attention(c: Settings) -> Part:
    """Multi-head latent attention: queries and keys through narrow layers. Every head gets keys and values of its own.

    The cache has what they are made of. They have different widths, for which the CPU's kernel is not made: there
    attention is written out.
    """
    width, heads = c["hidden_size"], c["num_attention_heads"]
    plain, rotary, value = c["qk_nope_head_dim"], c["qk_rope_head_dim"], c["v_head_dim"]
    narrow, latent, bias = c.get("q_lora_rank"), c["kv_lora_rank"], c.get("attention_bias", False)
    query = (
        linear("q_a_proj", width, narrow, bias) + norm(narrow) + linear("q_b_proj", narrow, heads * (plain + rotary))
        if narrow
        else linear("q_proj", width, heads * (plain + rotary))
    )
    kept = width + 3 * heads * (plain + rotary) + 3 * heads * value + latent + (narrow or 0)
    return (
        query
        + linear("kv_a_proj_with_mqa", width, latent + rotary, bias)
        + norm(latent)
        + linear("kv_b_proj", latent, heads * (plain + value))
        + linear("o_proj", heads * value, width, bias)
        + Part(narrow=kept, pairs=heads, cache=latent + rotary)
    )


def _gpt2(c: Settings) -> Layers:
    width = c["n_embd"]
    inner = c.get("n_inner") or 4 * width
    layer = (
        linear("c_attn", width, 3 * width, bias=True)
        + linear("c_proj", width, width, bias=True)
        + linear("c_fc", width, inner, bias=True)
        + linear("c_proj", inner, width, bias=True)
        + layer_norm(width)
        + layer_norm(width)
        + Part(narrow=6 * width + 5 * inner, cache=2 * width)  # the activation is written out
    )
    return [layer] * c["n_layer"]


def _gpt_neox(c: Settings) -> Layers:
    width, inner, bias = c["hidden_size"], c["intermediate_size"], c.get("attention_bias", True)
    layer = (
        linear("query_key_value", width, 3 * width, bias)
        + linear("dense", width, width, bias)
        + linear("dense_h_to_4h", width, inner, bias=True)
        + linear("dense_4h_to_h", inner, width, bias=True)
        + layer_norm(width)
        + layer_norm(width)
        + Part(narrow=8 * width + 2 * inner, cache=2 * width)
    )
    return [layer] * c["num_hidden_layers"]


def _cohere(c: Settings) -> Layers:
    """Attention and feed-forward side by side behind one norm."""
    width, bias = c["hidden_size"], c.get("attention_bias", False)
    size = width // c["num_attention_heads"]
    own = Part(other=(c["num_attention_heads"] + c["num_key_value_heads"]) * size * bool(c.get("use_qk_norm", False)))
    layer = attention(c, bias, bias) + own + feed_forward(width, c["intermediate_size"]) + norm(width)
    return [layer] * c["num_hidden_layers"]


# ---------------------------------------------------------------- linear attention, convolutions, state spaces


def _qwen3_next(c: Settings) -> Layers:
    width, every, plain = c["hidden_size"], c.get("decoder_sparse_step", 1), c.get("mlp_only_layers") or ()
    sparse = experts(width, c["moe_intermediate_size"], c["num_experts"], c["num_experts_per_tok"])
    sparse += feed_forward(width, c["shared_expert_intermediate_size"]) + linear("shared_expert_gate", width, 1)
    dense = feed_forward(width, c["intermediate_size"])
    bias = c.get("attention_bias", False)
    own = attention(c, bias, bias, gated=True) + head_norms(c)
    layers = []
    for i, kind in enumerate(_kinds(c, c.get("full_attention_interval", 4))):
        mixer = own if kind == "full_attention" else _delta_net(c)
        is_sparse = i not in plain and (i + 1) % every == 0
        layers.append(mixer + (sparse if is_sparse else dense) + norm(width) + norm(width))
    return layers


def _kinds(c: Settings, interval: int) -> list[str]:
    default = [
        "full_attention" if (i + 1) % interval == 0 else "linear_attention" for i in range(c["num_hidden_layers"])
    ]
    return c.get("layer_types") or default


def _delta_net(c: Settings) -> Part:
    width, values = c["hidden_size"], c["linear_num_value_heads"]
    keys = c["linear_num_key_heads"] * c["linear_key_head_dim"]
    all_values = values * c["linear_value_head_dim"]
    convolution = (2 * keys + all_values) * c.get("linear_conv_kernel_dim", 4)
    return (
        linear("in_proj_qkvz", width, 2 * keys + 2 * all_values)
        + linear("in_proj_ba", width, 2 * values)
        + linear("out_proj", all_values, width)
        + Part(other=convolution + 2 * values + c["linear_value_head_dim"])
    )


def _lfm2(c: Settings) -> Layers:
    width = c["hidden_size"]
    inner = c.get("block_ff_dim") or c["intermediate_size"]
    if c.get("block_auto_adjust_ff_dim", True):
        multiple = c.get("block_multiple_of", 256)
        inner = int(c.get("block_ffn_dim_multiplier", 1.0) * int(2 * inner / 3))
        inner = multiple * -(-inner // multiple)
    bias = c.get("conv_bias", False)
    convolution = Part(other=width * (c.get("conv_L_cache", 3) + bias))
    convolution += linear("in_proj", width, 3 * width, bias) + linear("out_proj", width, width, bias)
    own = attention(c, out="out_proj") + head_norms(c)
    rest = linear("w1", width, inner) + linear("w3", width, inner) + linear("w2", inner, width)
    rest += norm(width) + norm(width)
    full = c.get("full_attn_idxs")
    attends = range(c["num_hidden_layers"]) if full is None else full
    default = ["full_attention" if i in attends else "conv" for i in range(c["num_hidden_layers"])]
    return [rest + (own if kind == "full_attention" else convolution) for kind in c.get("layer_types") or default]


def _mamba2_mixer(c: Settings, names: dict[str, str], gated_norm: bool = True) -> Part:
    """``names``: this family's name of each setting."""
    width, heads, state = c["hidden_size"], c[names["heads"]], c[names["state"]]
    inner, groups = c.get(names.get("inner", "")) or heads * c[names["head_size"]], c.get(names["groups"], 1)
    mixed = inner + 2 * groups * state
    bias, conv_bias = c.get(names["bias"], False), c.get(names["conv_bias"], True)
    return (
        linear("in_proj", width, inner + mixed + heads, bias)
        + linear("out_proj", inner, width, bias)
        + Part(other=mixed * (c[names["kernel"]] + conv_bias) + 3 * heads + inner * gated_norm)
    )


_OF_MAMBA2 = {
    "heads": "num_heads", "head_size": "head_dim", "state": "state_size", "groups": "n_groups", "kernel": "conv_kernel",
    "bias": "use_bias", "conv_bias": "use_conv_bias",
}  # fmt: skip
_OF_BAMBA = {
    "heads": "mamba_n_heads", "head_size": "mamba_d_head", "state": "mamba_d_state", "groups": "mamba_n_groups",
    "kernel": "mamba_d_conv", "bias": "mamba_proj_bias", "conv_bias": "mamba_conv_bias",
}  # fmt: skip
_OF_ZAMBA2 = {
    "heads": "n_mamba_heads", "head_size": "mamba_headdim", "state": "mamba_d_state", "groups": "mamba_ngroups",
    "kernel": "mamba_d_conv", "bias": "add_bias_linear", "conv_bias": "use_conv_bias",
}  # fmt: skip


def _bamba(c: Settings) -> Layers:
    width, bias = c["hidden_size"], c.get("attention_bias", False)
    rest = feed_forward(width, c["intermediate_size"], c.get("mlp_bias", False)) + norm(width) + norm(width)
    own, mamba = attention(c, bias, bias), _mamba2_mixer(c, _OF_BAMBA)
    attends = c.get("attn_layer_indices") or ()
    return [rest + (own if i in attends else mamba) for i in range(c["num_hidden_layers"])]


def _falcon_h1(c: Settings) -> Layers:
    """Attention and state space side by side in every layer."""
    width, bias = c["hidden_size"], c.get("attention_bias", False)
    names = _OF_BAMBA | {"inner": "mamba_d_ssm"}
    mixer = _mamba2_mixer(c, names, c.get("mamba_rms_norm", False))
    mlp = feed_forward(width, c["intermediate_size"], c.get("mlp_bias", False))
    return [attention(c, bias, bias) + mixer + mlp + norm(width) + norm(width)] * c["num_hidden_layers"]


def _mamba_mixer(c: Settings, inner: int, state: int, rank: int, kernel: int, bias: bool, conv_bias: bool) -> Part:
    width = c["hidden_size"]
    return (
        linear("in_proj", width, 2 * inner, bias)
        + linear("x_proj", inner, rank + 2 * state)
        + linear("dt_proj", rank, inner, bias=True)
        + linear("out_proj", inner, width, bias)
        + Part(other=inner * (kernel + conv_bias) + inner * state + inner)
    )


def _jamba(c: Settings) -> Layers:
    width, state, rank = c["hidden_size"], c.get("mamba_d_state", 16), c["mamba_dt_rank"]
    mamba = _mamba_mixer(
        c, c.get("mamba_expand", 2) * width, state, rank, c.get("mamba_d_conv", 4),
        c.get("mamba_proj_bias", False), c.get("mamba_conv_bias", True),
    ) + norm(rank) + norm(state) + norm(state)  # fmt: skip
    dense = feed_forward(width, c["intermediate_size"])
    sparse = experts(width, c["intermediate_size"], c["num_experts"], c["num_experts_per_tok"])
    sparse = sparse if c["num_experts"] > 1 else dense
    layers = []
    for i in range(c["num_hidden_layers"]):
        attends = i % c.get("attn_layer_period", 8) == c.get("attn_layer_offset", 4)
        is_sparse = i % c.get("expert_layer_period", 2) == c.get("expert_layer_offset", 1)
        layers.append(
            (attention(c) if attends else mamba) + (sparse if is_sparse else dense) + norm(width) + norm(width)
        )
    return layers


def _zamba2(c: Settings) -> Layers:
    """State spaces; some layers put a transformer block before them, which they share, with adapters of their own."""
    width, inner, rank = c["hidden_size"], c["intermediate_size"], c.get("adapter_rank", 128)
    kinds = c["layers_block_type"]
    mamba = _mamba2_mixer(c, _OF_ZAMBA2) + norm(width)
    wide = 2 * width
    heads, size = c["num_attention_heads"], c.get("attention_head_dim") or wide // c["num_attention_heads"]
    groups = c.get("num_key_value_heads") or heads
    bias = c.get("add_bias_linear", False)
    shared = (
        linear("q_proj", wide, heads * size)
        + linear("k_proj", wide, groups * size)
        + linear("v_proj", wide, groups * size)
        + linear("o_proj", heads * size, width)
        + linear("gate_up_proj", width, 2 * inner, bias)
        + linear("down_proj", inner, width, bias)
        + norm(wide)
        + norm(width)
    )
    adapter = linear("0", width, rank) + linear("1", rank, 2 * inner)
    if c.get("use_shared_attention_adapter", False):
        for _ in ("query", "key", "value"):
            adapter += linear("0", wide, rank) + linear("1", rank, wide)
    hybrid = mamba + linear("linear", width, width) + adapter + Part(cache=2 * groups * size)
    layers = [hybrid if kind == "hybrid" else mamba for kind in kinds]
    first = [i for i, kind in enumerate(kinds) if kind == "hybrid"][: c.get("num_mem_blocks", 1)]
    return [layer + shared if i in first else layer for i, layer in enumerate(layers)]


def _mamba(c: Settings) -> Layers:
    inner = c.get("intermediate_size") or int(c.get("expand", 2) * c["hidden_size"])
    mixer = _mamba_mixer(
        c, inner, c["state_size"], _time_step_rank(c), c.get("conv_kernel", 4),
        c.get("use_bias", False), c.get("use_conv_bias", True),
    )  # fmt: skip
    return [mixer + norm(c["hidden_size"])] * c["num_hidden_layers"]


def _time_step_rank(c: Settings) -> int:
    rank = c.get("time_step_rank", "auto")
    return -(-c["hidden_size"] // 16) if rank == "auto" else int(rank)


def _mamba2(c: Settings) -> Layers:
    return [_mamba2_mixer(c, _OF_MAMBA2) + norm(c["hidden_size"])] * c["num_hidden_layers"]


FAMILIES: dict[str, Callable[[Settings], Layers]] = {
    "llama": _llama, "mistral": _llama, "granite": _llama, "qwen2": _qwen2, "qwen3": _qwen3, "qwen3_moe": _qwen3_moe,
    "mixtral": _mixtral, "gemma2": _gemma2, "gemma3_text": _gemma3, "phi3": _phi3, "olmo2": _olmo2, "gpt_oss": _gpt_oss,
    "deepseek_v3": _deepseek_v3, "gpt2": _gpt2, "gpt_neox": _gpt_neox, "cohere": _cohere, "qwen3_next": _qwen3_next,
    "lfm2": _lfm2, "bamba": _bamba, "falcon_h1": _falcon_h1, "jamba": _jamba, "zamba2": _zamba2, "mamba": _mamba,
    "mamba2": _mamba2,
}  # fmt: skip

DEFAULTS: dict[str, dict[str, Any]] = {
    "mistral": {"num_key_value_heads": 8, "head_dim": None},
    "gemma2": {"tie_word_embeddings": True, "head_dim": 256, "num_key_value_heads": 4},
    "gemma3_text": {"tie_word_embeddings": True, "head_dim": 256, "num_key_value_heads": 4},
    "gpt2": {"tie_word_embeddings": True, "n_positions": 1024},
    "cohere": {"tie_word_embeddings": True},
    "gpt_oss": {"head_dim": 64},
    "lfm2": {"tie_word_embeddings": True},
    "zamba2": {"tie_word_embeddings": True},
    "mamba": {"tie_word_embeddings": True},
}
"""What a `config.json` of a family means where it leaves a setting out; those of all families are in `shape_of`."""

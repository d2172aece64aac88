"""Models and runs of which the size is worked out."""

from builders import DATA, PROMPTS, make_run

from controller.plan.sizes import PhaseSize, run_sizes

LLAMA_8B = {
    "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256, "tie_word_embeddings": False,
}  # fmt: skip


QWEN_1B = {
    "model_type": "qwen2", "hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28,
    "num_attention_heads": 12, "num_key_value_heads": 2, "vocab_size": 151936, "tie_word_embeddings": True,
}  # fmt: skip
SEVENTY = LLAMA_8B | {
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
}
BIG, SMALL = 8_030_261_248, 1_543_714_304
CONFIGS = {("org/big", None): LLAMA_8B, ("org/small", None): QWEN_1B, ("org/small", "v2"): QWEN_1B}
ON_POLICY = {"prompts": PROMPTS, "onPolicyFraction": 1}


EIGHT_H100 = {"procsPerNode": 8, "nodeSelector": {"nvidia.com/gpu.product": "NVIDIA-H100-80GB-HBM3"}}


def tuned(source: str, name: str = "sft", **settings) -> dict:
    return {"name": name, "sft": {"model": {"source": source}, "data": DATA, **settings}}


def one(phase: dict, configs=CONFIGS, template=EIGHT_H100) -> PhaseSize:
    return run_sizes(make_run(phase, template=template), configs)[phase["name"]]

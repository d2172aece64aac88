"""Low-rank adapters (Hu et al. 2021), through peft."""

from typing import Any

import torch

from trainers.contract import BadInput
from trainers.spec import Lora


def with_adapters(model: Any, lora: Lora, seed: int) -> Any:
    from peft import LoraConfig, get_peft_model

    head = "score" if hasattr(model, "score") else None
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=list(lora.target_modules),
        modules_to_save=[head] if head else None,
    )
    torch.manual_seed(seed)
    try:
        adapters = get_peft_model(model, config)
    except ValueError as error:
        raise BadInput(f"lora.targetModules {list(lora.target_modules)}: {str(error).splitlines()[0]}") from error
    if model.is_gradient_checkpointing:
        # Frozen embeddings give the first checkpointed block no input that needs a gradient.
        adapters.enable_input_require_grads()
    return adapters

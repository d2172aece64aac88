"""Low-rank adapters (Hu et al. 2021), through peft."""

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from trainers.contract import BadInput
from trainers.core.layers import score_head_name
from trainers.core.sharding import is_split, whole
from trainers.spec import Lora

READ_DIRECTLY = {
    "falcon_h1": ("out_proj",),
    "jamba": ("dt_proj", "x_proj"),
    "mamba": ("dt_proj", "out_proj", "x_proj"),
    "mamba2": ("out_proj",),
}
"""Layers of model types that read their weight without calling the layer: an adapter would be merged and never trained."""


def with_adapters(model: Any, lora: Lora, seed: int) -> Any:
    """The peft model around ``model``: its linear layers, or those that are named, get adapters; a score head is trained whole.

    Raises BadInput for a name that no layer has, and for layers that can have no adapter.
    """
    from peft import LoraConfig

    names = list(lora.target_modules) or linear_names(model)
    check_names(model, names)
    _untie(model, names)
    head = score_head_name(model)
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=names,
        modules_to_save=[head] if head else None,
        task_type="SEQ_CLS" if head else "CAUSAL_LM",
    )
    # peft asks the model itself, and a classifier around a packed backbone is new.
    model.is_loaded_in_4bit = any(hasattr(p, "quant_state") for p in model.parameters())
    torch.manual_seed(seed)
    try:
        adapters = _for_whole_layers(model, config)
    except ValueError as error:
        raise BadInput(f"lora.targetModules {names}: {str(error).splitlines()[0]}") from error
    _say_of_experts(model, adapters)
    if model.is_gradient_checkpointing:
        # Frozen embeddings give the first checkpointed block no input that needs a gradient.
        adapters.enable_input_require_grads()
    return adapters


def _say_of_experts(model: Any, adapters: Any) -> None:
    """Which experts get adapters. peft takes stacked ones for the layers of a name that experts for all tokens have too."""
    stacked = stacked_experts(model)
    if not stacked:
        return
    taken = sorted(getattr(adapters.peft_config["default"], "target_parameters", None) or ())
    if not taken:
        print(f"lora: experts' stacked weights get no adapters and stay as they are ({', '.join(stacked)})")
        return
    print(f"lora: experts' stacked weights get adapters ({', '.join(taken)}); experts that all tokens visit get none")


def _for_whole_layers(model: Any, config: Any) -> Any:
    """The peft model, with adapters as large as layers are while they compute.

    peft takes any split weight for one of tensor parallelism, whose layers compute with their parts alone, unless its
    mesh is called as peft expects, which one of two dimensions cannot be.
    """
    from peft import get_peft_model
    from peft.tuners import tuners_utils

    before = tuners_utils._torch_supports_distributed
    tuners_utils._torch_supports_distributed = False  # alone decides whether it looks at what a layer holds
    try:
        return get_peft_model(model, config)
    finally:
        tuners_utils._torch_supports_distributed = before


def linear_names(model: Any) -> list[str]:
    """Last parts of the names of a model's linear layers, but for its language or score head."""
    heads = (model.get_output_embeddings(), getattr(model, score_head_name(model) or "", None))
    found = {
        name.rsplit(".", 1)[-1]
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and all(module is not head for head in heads)
    }
    numbers = {name for name in found if name.isdigit()}  # places in a list, which other layers have too
    return sorted(found - numbers - set(READ_DIRECTLY.get(model.config.model_type, ())))


def stacked_experts(model: Any) -> list[str]:
    """Last parts of the names of weights that hold all experts of a layer in one tensor, which no linear layer owns."""
    return sorted(
        {name.rsplit(".", 1)[-1] for name, p in model.named_parameters() if ".experts." in name and p.ndim == 3}
    )


def save_adapters(adapters: Any, folder: Path, writes: bool = True) -> None:
    """Write the adapters alone, as peft loads them onto the model that they were trained on.

    All processes take part; one ``writes``.
    """
    state = {name: whole(t) for name, t in adapters.state_dict(keep_vars=True).items() if _is_saved(name)}
    if not writes:
        return
    config = adapters.peft_config["default"]
    config.target_modules = sorted(config.target_modules)  # peft holds sets, whose order changes from run to run
    if config.modules_to_save:
        config.modules_to_save = sorted(config.modules_to_save)
    adapters.save_pretrained(folder, state_dict=state, save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)  # a form to be filled in


def _is_saved(name: str) -> bool:
    return ".lora_" in name or ".modules_to_save." in name


def check_names(model: Any, names: list[str]) -> None:
    """Raise BadInput for a name that no layer has, or one that can have no adapter. Weights are not looked at."""
    modules = [name for name, _ in model.named_modules()]
    stacked = stacked_experts(model)
    experts = f"; experts' stacked weights ({', '.join(stacked)}) can have no adapters" if stacked else ""
    for name in names:
        if not any(_means(name, module) for module in modules):
            raise BadInput(
                f"lora.targetModules {name!r}: no layer is called that; there are {linear_names(model)}{experts}"
            )
        kind = model.config.model_type
        if name.rsplit(".", 1)[-1] in READ_DIRECTLY.get(kind, ()):
            raise BadInput(f"lora.targetModules {name!r}: models of type {kind} read its weight without calling it")


def _untie(model: Any, names: list[str]) -> None:
    """Give head and embeddings a weight each, if they share one and either gets an adapter.

    Else merging would change both, and the saved model would have other logits than the trained one.
    """
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if head is None or head.weight is not embedding.weight:
        return
    ends = [name for name, module in model.named_modules() if module is head or module is embedding]
    if any(_means(name, end) for name in names for end in ends):
        if is_split(model):
            raise BadInput(
                f"lora.targetModules {names}: embeddings that are the language head too have been split as one weight, "
                "and cannot become two: leave them and the head out, or set strategy ddp"
            )
        head.weight = nn.Parameter(embedding.weight.detach().clone())
        model.config.tie_word_embeddings = model.config.get_text_config().tie_word_embeddings = False


def _means(name: str, module: str) -> bool:
    """Whether a name among ``targetModules`` means a module, as peft reads it."""
    return module == name or module.endswith(f".{name}")

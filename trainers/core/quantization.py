"""Bases held in 4 bits beneath adapters (QLoRA, Dettmers et al. 2023, arXiv:2305.14314), by bitsandbytes.

A linear layer's weights are packed in blocks of 64: each is the nearest of the 16 numbers of NF4 times the block's largest
magnitude. Those magnitudes have 8 bits each, in blocks of 256 (double quantization): 4.127 bits a weight in all. A layer
computes with the weights that this gives, in the type of the arithmetic.
"""

import logging
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import BitsAndBytesConfig
from transformers.pytorch_utils import Conv1D

from trainers.contract import BadInput
from trainers.core.adapters import linear_names, stacked_experts

BLOCK = 64
"""Weights with a scale of their own."""


@dataclass(frozen=True)
class FourBit:
    """How a model is packed while its files are read."""

    compute: torch.dtype
    """Type of the arithmetic."""
    device: torch.device

    def loading(self, empty: Any) -> dict[str, Any]:
        """Arguments for ``from_pretrained`` of a model that is like ``empty``, which has no weights.

        Raises BadInput if bitsandbytes is not installed, and for models most of whose weights would stay as they are.
        """
        _check_installed()
        if getattr(empty.config, "quantization_config", None) is not None:
            raise BadInput(
                "lora.quantization nf4: the model's weights are quantized already: use one with whole weights"
            )
        if stacked := stacked_experts(empty):
            raise BadInput(
                f"lora.quantization nf4: models of type {empty.config.model_type} hold their experts as stacked weights "
                f"({', '.join(stacked)}), which bitsandbytes cannot pack: leave quantization out"
            )
        if self.device.type == "cpu":
            _check_rows(empty)
        config = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=self.compute,
            llm_int8_skip_modules=_kept_whole(empty),  # its name is of the time when there were 8 bits alone
        )
        return {"quantization_config": config, "device_map": {"": self.device}}


def _check_installed() -> None:
    # Some CPUs have a kernel that it would fetch as a program from the hub; that it could not, it would say in each process.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    try:
        import bitsandbytes  # noqa: F401
    except ImportError as error:
        raise BadInput(
            "lora.quantization nf4 needs the package bitsandbytes: install this package's extra `qlora` "
            "(make qlora, or pip install '.[qlora]')"
        ) from error


def _check_rows(model: Any) -> None:
    """Raise BadInput for rows that bitsandbytes 0.50 unpacks wrongly on CPUs: it takes each for a number of whole blocks."""
    kept = set(_kept_whole(model))
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | Conv1D) and name not in kept:
            inputs = module.weight.shape[0 if isinstance(module, Conv1D) else 1]
            if inputs % BLOCK:
                raise BadInput(
                    f"lora.quantization nf4: {name} has {inputs} inputs; on a CPU they must be a multiple of {BLOCK}"
                )


def _kept_whole(model: Any) -> list[str]:
    """Names of linear layers that stay as they are: heads, and those whose weight is read without calling them."""
    packed, head = set(linear_names(model)), model.get_output_embeddings()
    linear = ((name, m) for name, m in model.named_modules() if isinstance(m, nn.Linear | Conv1D))
    return [name for name, module in linear if module is head or name.rsplit(".", 1)[-1] not in packed]


def settle(model: Any) -> None:
    """Let a model that was packed while it was read compute as one with whole weights does, and be saved as one."""
    from bitsandbytes.nn import Linear4bit

    for module in model.modules():
        if isinstance(module, Linear4bit):
            # On some CPUs it would pack its weights anew when it is first called in eval mode, with rounded scales, and
            # have no gradients from then on.
            module.support_avx512bf16_for_cpu = False
            module.register_forward_pre_hook(_as_under_autocast)
            module.weight.turned = issubclass(module.source_cls, Conv1D)
    del model.config.quantization_config


def _as_under_autocast(layer: nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """What a plain linear layer does with its input: bitsandbytes leaves autocast out and would answer in fp32."""
    kind = inputs[0].device.type
    if not torch.is_autocast_enabled(kind):
        return inputs
    return (inputs[0].to(torch.get_autocast_dtype(kind)), *inputs[1:])


def is_packed(weight: torch.Tensor) -> bool:
    return getattr(weight, "quant_state", None) is not None


def scales(weight: Any) -> torch.Tensor:
    """The magnitudes of a packed weight's blocks, (blocks,)."""
    from bitsandbytes.functional import dequantize_blockwise

    state = weight.quant_state
    return dequantize_blockwise(state.absmax, state.state2) + state.offset


def dequantized(weight: Any) -> torch.Tensor:
    """The weights that a packed layer computes with, (outputs, inputs), in the type that it was read in."""
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(weight.data, weight.quant_state)


def is_turned(weight: torch.Tensor) -> bool:
    """Whether a packed weight lies the other way in the model's files: (inputs, outputs), as in GPT-2."""
    return bool(getattr(weight, "turned", False))


def packed_bytes(weight: Any) -> int:
    """What a packed weight takes on its device."""
    state = weight.quant_state
    parts = (weight, state.code, state.absmax, state.offset, state.state2.code, state.state2.absmax)
    return sum(part.numel() * part.element_size() for part in parts)

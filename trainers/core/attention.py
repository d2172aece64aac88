"""How a model attends: which of transformers' attention functions it calls, and one that transformers lacks.

Packed rows need attention that keeps sequences apart. ``sdpa`` and ``eager`` do so by a mask of all pairs of a row's
positions; ``flash`` (the flash-attn package), ``varlen`` (torch's own kernel, :mod:`torch.nn.attention.varlen`) and
``flex`` never look at pairs of different sequences, so that all of them can lie in one row without padding. transformers
looks an attention function up by the name in a model's config at every call; ``varlen`` is registered here.

Names: R rows of L positions, H heads of width D, S sequences.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn.attention import varlen
from transformers.masking_utils import AttentionMaskInterface, flash_attention_mask
from transformers.modeling_utils import AttentionInterface
from transformers.utils import is_flash_attn_2_available, is_flash_attn_3_available

from trainers.contract import BadInput
from trainers.core.batch import Batch, Packing
from trainers.core.compiling import missing_compiler
from trainers.core.parallel import Workers

OF_GPUS = ("flash", "varlen", "flex")
"""The ones that see no pairs of different sequences, the best first."""

WIDEST_HEAD = 256
"""Of flash attention's kernels, torch's among them."""


def settle(model: Any, workers: Workers, differs: Callable[[Packing], bool]) -> Packing:
    """Give a model the attention that ``parallel.attention`` asks for, and find out how sequences can share rows.

    ``differs`` compares a packed batch with sequences alone. With ``auto`` it is the best that the model can have on
    this device and that keeps sequences apart; otherwise BadInput is raised if the model cannot have what is asked for.
    """
    own = model.config._attn_implementation
    wanted: list[str] = [workers.attention]
    if workers.attention == "auto":
        # Without a GPU it is what transformers chooses: the others have no kernels, or none for the backward pass.
        wanted = [name for name in OF_GPUS if why_not(model, name, workers.device.type, workers.bf16) is None]
    elif (reason := why_not(model, workers.attention, workers.device.type, workers.bf16)) is not None:
        kind = model.config.model_type
        raise BadInput(f"parallel.attention: models of type {kind} cannot use {workers.attention}: {reason}")
    for name in wanted:
        model.set_attn_implementation(_implementation(name))
        packing = Packing.ONE_ROW if name in OF_GPUS else Packing.ROWS
        if not differs(packing):
            return _said(model, workers, name, packing)
    if workers.attention == "auto":
        model.set_attn_implementation(own)
        return Packing.PADDED if differs(Packing.ROWS) else _said(model, workers, own, Packing.ROWS)
    return Packing.PADDED


def _said(model: Any, workers: Workers, name: str, packing: Packing) -> Packing:
    if workers.is_main and workers.device.type != "cpu":
        print(f"attention of the {model.config.model_type}: {name}")
    return packing


def why_not(model: Any, name: str, device: str, bf16: bool) -> str | None:
    """Why a model cannot have an attention on a type of device, or None."""
    if name == "eager":
        return None
    supported = {"sdpa": "_supports_sdpa", "flex": "_supports_flex_attn"}.get(name, "_supports_flash_attn")
    if not getattr(model, supported) or (name == "varlen" and not model._supports_attention_backend):
        return "transformers has it not for them"
    if name not in OF_GPUS:
        return None
    config = model.config.get_text_config()
    if device != "cuda":
        return f"it needs a GPU, and this is a {device}"
    trained = any(weight.requires_grad for weight in model.parameters())
    if name != "flash" and trained and getattr(config, "attention_dropout", None):
        return f"it has no dropout, and attention_dropout is {config.attention_dropout}"
    return _why_not_compiled(device) if name == "flex" else _why_no_kernel(model, config, name, bf16)


def _why_not_compiled(device: str) -> str | None:
    missing = missing_compiler(device)
    return None if missing is None else f"it is compiled where it runs, and there is no {missing} here"


def _why_no_kernel(model: Any, config: Any, name: str, bf16: bool) -> str | None:
    """What is to be said against flash attention's kernels, which ``varlen`` has too."""
    width = _head_width(config)
    sinks = any(weight.endswith("sinks") for weight, _ in model.named_parameters())
    against = {
        "it computes in bf16, and parallel.precision is fp32": not bf16,
        "the package flash-attn is not installed": name == "flash"
        and not (is_flash_attn_2_available() or is_flash_attn_3_available()),
        "their attention has sinks": sinks or getattr(model, "_compatible_flash_implementations", None),
        "their attention goes by chunks": getattr(config, "attention_chunk_size", None),
        "their attention has a soft cap": name == "varlen" and getattr(config, "attn_logit_softcapping", None),
        f"their heads are {width} wide, and it takes up to {WIDEST_HEAD}, in eights": width > WIDEST_HEAD or width % 8,
    }
    return next((reason for reason, holds in against.items() if holds), None)


def _head_width(config: Any) -> int:
    if getattr(config, "kv_lora_rank", None):  # latent attention
        return int(config.qk_nope_head_dim + config.qk_rope_head_dim)
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def _implementation(name: str) -> str:
    """transformers' name."""
    flash = "flash_attention_3" if is_flash_attn_3_available() else "flash_attention_2"
    return {"flash": flash, "flex": "flex_attention"}.get(name, name)


def in_halves(model: Any) -> bool:
    """Whether a model attends in bf16 and under autocast only, as flash attention and varlen do."""
    name = model.config._attn_implementation
    return bool(name == "varlen" or name.startswith("flash"))


def bounds_of(model: Any, batch: Batch) -> dict[str, Any]:
    """Arguments of a forward pass that tell flash attention and varlen where a packed batch's sequences begin."""
    if batch.bounds is None or not in_halves(model):
        return {}
    ends = {"cu_seq_lens_q": batch.bounds, "cu_seq_lens_k": batch.bounds}
    return {**ends, "max_length_q": batch.longest, "max_length_k": batch.longest}


@contextmanager
def with_a_cache(model: Any) -> Iterator[None]:
    """A model's attention inside takes keys from a cache and a mask of padding, as transformers' own choice does."""
    before = model.config._attn_implementation
    if before in ("sdpa", "eager"):
        yield
        return
    model.set_attn_implementation("sdpa" if model._supports_sdpa else "eager")
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def varlen_attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    is_causal: bool | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    max_length_q: int | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' interface of torch's variable-length attention: (R, H, L, D) to (R, L, H, D).

    ``cu_seq_lens_q``, (S + 1,) in int32, are the first positions of all sequences, row behind row, and the end; without
    them every row is one. Raises BadInput for anything that the kernel would leave out.
    """
    left_out = [name for name in ("softcap", "s_aux", "position_bias", "cache") if others.get(name) is not None]
    if dropout or attention_mask is not None or key.shape[2] != query.shape[2]:
        left_out.append("dropout, a mask or a cache of keys")
    if left_out or not (module.is_causal if is_causal is None else is_causal):
        kind = module.config.model_type
        raise BadInput(f"parallel.attention varlen: models of type {kind} attend with {', '.join(left_out)}")
    rows, _, length, width = query.shape
    if cu_seq_lens_q is None or max_length_q is None:
        cu_seq_lens_q = torch.arange(0, (rows + 1) * length, length, dtype=torch.int32, device=query.device)
        max_length_q = length
    value_width = value.shape[-1]
    value = torch.nn.functional.pad(value, (0, width - value_width))
    dtype = torch.get_autocast_dtype(query.device.type) if torch.is_autocast_enabled(query.device.type) else value.dtype
    query, key, value = (states.transpose(1, 2).flatten(0, 1).to(dtype) for states in (query, key, value))
    found = varlen.varlen_attn(
        query,
        key,
        value,
        cu_seq_lens_q,
        cu_seq_lens_q,
        max_length_q,
        max_length_q,
        scale=scaling,
        window_size=(-1 if sliding_window is None else sliding_window - 1, 0),
        enable_gqa=query.shape[1] != key.shape[1],
    )
    assert isinstance(found, torch.Tensor)
    return found.view(rows, length, -1, width)[..., :value_width], None


AttentionInterface.register("varlen", varlen_attention)
AttentionMaskInterface.register("varlen", flash_attention_mask)

"""Optimizer, length and adapters of a training."""

from typing import Literal

from pydantic import Field

from trainers.spec.base import SpecModel


class Optim(SpecModel):
    """AdamW, its schedule, and gradient clipping."""

    lr: float = Field(default=2e-5, gt=0, le=1e6)
    """Peak learning rate."""
    weight_decay: float = Field(default=0.0, ge=0, le=1e6)
    """Decoupled weight decay; never applied to biases and norms."""
    beta1: float = Field(default=0.9, ge=0, lt=1)
    """Decay of the first moment."""
    beta2: float = Field(default=0.999, ge=0, lt=1)
    """Decay of the second moment."""
    eps: float = Field(default=1e-8, ge=1e-20)
    """Added to the denominator."""
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    """Shape after warm-up."""
    warmup_ratio: float = Field(default=0.05, ge=0, lt=1)
    """Share of all steps spent in linear warm-up."""
    min_lr_ratio: float = Field(default=0.0, ge=0, le=1)
    """Final learning rate as a share of the peak."""
    max_grad_norm: float = Field(default=1.0, gt=0)
    """Gradients are clipped to this global norm."""
    state_dtype: Literal["fp32", "bf16"] = "fp32"
    """How AdamW's two moments are held; `bf16` halves them, rounded at random so that small changes are not lost."""


class Duration(SpecModel):
    """How long to train: `epochs`, or exactly `maxSteps` if that is set."""

    epochs: float = Field(default=1.0, gt=0)
    """Passes over the training rows; of a distillation over the traces, or over the prompts if it has no traces."""
    max_steps: int | None = Field(default=None, ge=1)
    """Optimizer steps, whatever `epochs` says: fewer than its passes need, or more, for which the rows are repeated."""


class Lora(SpecModel):
    """Low-rank adapters (Hu et al. 2021) through peft, trained at about ten times the learning rate of all weights; merged into the weights that are saved, and saved alone in `model/adapter`."""

    rank: int = Field(default=16, ge=1)
    """Rank of the update."""
    alpha: float = Field(default=32.0, gt=0)
    """Scale; the update is multiplied by alpha / rank."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout on the adapter's input."""
    target_modules: tuple[str, ...] = ()
    """Names of the linear layers that get an adapter, such as `q_proj`; all of them but the head unless set."""
    quantization: Literal["nf4"] | None = None
    """`nf4` holds the base's linear layers in 4 bits (QLoRA, Dettmers et al. 2023) by bitsandbytes; not with `fsdp` or `deepspeed`."""

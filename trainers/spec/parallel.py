"""How a phase is spread over processes."""

from typing import Literal, Self

from pydantic import Field, model_validator

from trainers.spec.base import SpecModel


class Fsdp(SpecModel):
    """Fully sharded data parallelism (torch FSDP2): weights, gradients and moments are split over processes, and a layer's weights are gathered while it computes."""

    gather_dtype: Literal["auto", "fp32", "bf16"] = "auto"
    """Type in which layers' weights are gathered: `auto` is that of the arithmetic, `bf16` goes with `precision: bf16` alone. They are held, reduced and updated in the model's own, in which embeddings, head and last norm are gathered too."""
    cpu_offload: bool = False
    """Hold weights, gradients and moments in the machine's memory, and update there; a layer's weights come to the device while it computes."""
    reshard_after_forward: bool = True
    """Free a layer's weights after its forward pass and gather them again for its backward pass; `false` keeps them in between, for less traffic and more memory."""
    hybrid: bool = False
    """Split over the processes of one node and repeat that on every node, so that only gradients cross between nodes."""


class DeepSpeed(SpecModel):
    """DeepSpeed's ZeRO (Rajbhandari et al. 2020)."""

    stage: int = Field(default=2, ge=1, le=3)
    """What is split over processes: moments (1), gradients too (2), weights too (3)."""
    offload_optimizer: bool = False
    """Hold moments, and the weights they update, in the machine's memory, and update there."""
    offload_parameters: bool = False
    """Hold weights in the machine's memory; of stage 3."""
    config: str | None = Field(default=None, min_length=1)
    """A DeepSpeed JSON file for everything else (relative paths start at the run file). It may not hold what the run itself says, such as batch sizes or the optimizer."""

    @model_validator(mode="after")
    def _parameters_are_split(self) -> Self:
        if self.offload_parameters and self.stage < 3:
            raise ValueError(f"offloadParameters needs stage 3, which splits parameters; stage is {self.stage}")
        return self


class Parallel(SpecModel):
    """How one phase is spread over processes."""

    NOT_IDENTITY = frozenset(
        {
            "strategy",
            "fsdp",
            "deepspeed",
            "frozen",
            "gradient_checkpointing",
            "compile",
            "micro_batch_tokens",
            "attention",
        }
    )
    SHRINKS = frozenset({"micro_batch_tokens"})

    strategy: Literal["auto", "single", "ddp", "fsdp", "deepspeed"] = "auto"
    """`auto`: `single` for one process, `ddp` for more, which both hold whole models. `fsdp` and `deepspeed` split what is trained over processes."""
    fsdp: Fsdp | None = None
    """Settings of strategy `fsdp`."""
    deepspeed: DeepSpeed | None = None
    """Settings of strategy `deepspeed`."""
    frozen: Literal["auto", "replicated", "sharded", "offloaded"] = "auto"
    """How models that are not trained (reference, teacher, reward model, what is evaluated) are held: whole on every device, split over processes as by `fsdp`, or split in the machine's memory. `auto` splits them where weights that are trained are."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Arithmetic of forward and backward up to the last hidden state; what follows is fp32 always. `auto` is bf16 on GPUs that have it, else fp32."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    compile: bool = False
    """Compile decoder layers with torch.compile: each start takes minutes more, each step less; numbers differ by rounding. Sampling is not compiled. Needs a C++ compiler (g++), for GPUs a C compiler; not with DeepSpeed's stage 3."""
    micro_batch_tokens: int = Field(default=8192, ge=8)
    """Tokens in one forward pass on one device. A step larger than that accumulates gradients; the result is the same."""
    attention: Literal["auto", "sdpa", "eager", "flash", "varlen", "flex"] = "auto"
    """How models attend where tokens are scored. `flash` (the package flash-attn), `varlen` (torch's own kernel) and `flex` need a GPU and waste nothing on packed rows; `sdpa` and `eager` mask them. `auto` is the first of those in this order that a model can have, and transformers' own choice without a GPU. Responses are generated with `sdpa` or `eager`."""

    @model_validator(mode="after")
    def _settings_of_the_strategy(self) -> Self:
        for name in ("fsdp", "deepspeed"):
            if getattr(self, name) is not None and self.strategy != name:
                raise ValueError(f"{name} is set, but strategy is {self.strategy}: set strategy {name}, or remove it")
        if self.compile and self.deepspeed is not None and self.deepspeed.stage == 3:
            raise ValueError(
                "compile is set, and deepspeed.stage 3 gathers weights within layers, which cannot be compiled: set strategy fsdp, or compile: false"
            )
        if self.fsdp is not None and self.fsdp.gather_dtype == "bf16" and self.precision == "fp32":
            raise ValueError("fsdp.gatherDtype bf16 needs layers that compute in it: set precision bf16, or remove it")
        if self.strategy == "single" and self.frozen in ("sharded", "offloaded"):
            raise ValueError(f"strategy single cannot have frozen: {self.frozen}: set ddp, fsdp or deepspeed")
        return self

    @property
    def splits_weights(self) -> bool:
        """Whether a process holds only a part of the weights that are trained."""
        return self.strategy == "fsdp" or (self.deepspeed is not None and self.deepspeed.stage == 3)

    @property
    def splits_frozen(self) -> bool:
        """Whether a process holds only a part of the weights that are not trained."""
        return self.frozen in ("sharded", "offloaded") or (self.frozen == "auto" and self.splits_weights)

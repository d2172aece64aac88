"""What a user can set for PPO."""

from collections.abc import Mapping
from typing import Literal, Self

from pydantic import Field, model_validator

from trainers.spec import (
    Checkpoint,
    Lora,
    ModelRef,
    OnPolicySpec,
    Optim,
    PromptData,
    RewardModelRef,
    Sampling,
    SpecModel,
    check_prompts,
)


class PolicyOptim(Optim):
    """AdamW, its schedule, and gradient clipping, for a policy."""

    lr: float = Field(default=3e-6, gt=0, le=1e6)
    """Peak learning rate."""
    eps: float = Field(default=1e-5, ge=1e-20)
    """Added to the denominator."""


class CriticOptim(PolicyOptim):
    """AdamW, its schedule, and gradient clipping, for a critic."""

    lr: float = Field(default=6e-6, gt=0, le=1e6)
    """Peak learning rate; it has to keep up with the policy."""


class KlControl(SpecModel):
    coef: float = Field(default=0.05, ge=0)
    """Weight of the per-token KL penalty in the reward."""
    estimator: Literal["k1", "k3"] = "k1"
    """`k1` is log q - log ref; `k3` is the low-variance, non-negative form (Schulman 2020)."""
    target: float | None = Field(default=None, gt=0)
    """Adapt the coefficient so that the KL per response approaches this (Ziegler et al. 2019)."""
    horizon: int = Field(default=10_000, ge=1)
    """Responses over which the coefficient adapts."""


class PpoSpec(OnPolicySpec):
    """PPO with a separate critic against a reward model, on `{"prompt"}` rows."""

    policy: ModelRef
    """Model to align."""
    reward_model: RewardModelRef
    """Scores finished responses, as text: it may have another tokenizer and chat template than the policy."""
    critic: RewardModelRef | None = None
    """Scalar model that the critic starts from. Unless set that is the reward model if it reads the policy's tokens, else the policy with a fresh head."""
    reference: ModelRef | None = None
    """Model that the policy is held close to; the policy as it was at the start unless set."""
    data: PromptData
    """Prompts to respond to."""
    lora: Lora | None = None
    """Train low-rank adapters of the policy instead of all weights; the critic is trained whole."""
    iterations: int = Field(default=100, ge=1)
    """Rounds of generating and optimising."""
    batch_size: int = Field(default=64, ge=1)
    """Prompts per round, all processes together."""
    mini_batch_size: int | None = Field(default=None, ge=1)
    """Responses per optimizer step; the whole round unless set."""
    ppo_epochs: int = Field(default=4, ge=1)
    """Passes over a round's responses."""
    sampling: Sampling = Sampling()
    """Rollouts; training uses the same temperature."""
    optim: PolicyOptim = PolicyOptim()
    """The policy's optimizer."""
    critic_optim: CriticOptim = CriticOptim()
    """The critic's optimizer."""
    kl: KlControl = KlControl()
    """Penalty for leaving the reference."""
    gamma: float = Field(default=1.0, gt=0, le=1)
    """Discount."""
    gae_lambda: float = Field(default=0.95, ge=0, le=1)
    """Bias-variance trade-off of generalized advantage estimation (Schulman et al. 2016)."""
    clip_range: float = Field(default=0.2, gt=0)
    """Clip of the probability ratio."""
    value_clip_range: float = Field(default=0.2, gt=0)
    """Clip of the value's change."""
    whiten_rewards: bool = False
    """Scale rewards to unit variance without shifting them."""
    missing_eos_penalty: float = Field(default=0.0, ge=0)
    """Subtracted from the score of a response that does not end."""
    packing: bool = True
    """Put several sequences in one row without letting them attend to each other, instead of padding."""
    max_kl_per_update: float | None = Field(default=None, gt=0)
    """End a round's optimisation early once the policy has moved this far (approximate KL per token)."""
    checkpoint: Checkpoint = Checkpoint()
    """Saving of unfinished work."""

    @model_validator(mode="after")
    def _mini_batches_fit(self) -> Self:
        size = self.mini_batch_size
        if size is not None and self.batch_size % size:
            raise ValueError(f"batchSize {self.batch_size} is not a multiple of miniBatchSize {size}")
        if self.sampling.temperature == 0:
            raise ValueError("sampling.temperature 0 never explores: PPO needs a temperature above 0")
        if self.lora is not None and self.lora.dropout:
            raise ValueError(
                f"lora.dropout {self.lora.dropout} makes the ratio of new to old probability noise: PPO needs 0"
            )
        return self

    @model_validator(mode="after")
    def _server_takes_prompts(self) -> Self:
        check_prompts(self.server, "data", self.data, self.sampling)
        return self

    def row_schemas(self) -> Mapping[str, str]:
        return {"data": "prompt"}

    def final_metrics(self) -> tuple[str, ...]:
        last = ("rewardLast", "klLast", "klSequenceLast", "klCoefLast", "responseLengthLast", "endedShareLast")
        return ("rewardFirst", *last, "parameters")

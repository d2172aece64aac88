"""What a user can set for direct preference optimization."""

from collections.abc import Mapping
from typing import Literal, Self

from pydantic import Field, model_validator

from trainers.spec import Lora, ModelRef, Optim, TrainData, TrainingSpec


class DpoOptim(Optim):
    """AdamW, its schedule, and gradient clipping, for preferences: a learning rate of supervised training forgets too much."""

    lr: float = Field(default=1e-6, gt=0, le=1e6)
    """Peak learning rate."""


class DpoSpec(TrainingSpec):
    """Direct preference optimization on `{"prompt", "chosen", "rejected"}` rows."""

    policy: ModelRef
    """Model to align."""
    reference: ModelRef | None = None
    """Model that the policy is held close to; the policy as it was at the start unless set."""
    data: TrainData
    """Preference pairs."""
    optim: DpoOptim = DpoOptim()
    """Optimizer and schedule."""
    loss: Literal["sigmoid", "robust", "ipo", "hinge"] = "sigmoid"
    """`sigmoid` (Rafailov et al. 2023; with labelSmoothing it is cDPO), `robust` (Chowdhury et al. 2024), `ipo` (Azar et al. 2023), `hinge` (SLiC)."""
    beta: float = Field(default=0.1, gt=0)
    """Strength of the tie to the reference."""
    label_smoothing: float = Field(default=0.0, ge=0, lt=0.5)
    """Assumed share of flipped labels, for `sigmoid` and `robust`."""
    length_normalize: bool | None = None
    """Divide log-ratios by response length first; true for `ipo` and false for the others unless set."""
    nll_weight: float = Field(default=0.0, ge=0)
    """Weight of the chosen response's negative log-likelihood per token; keeps its probability from falling."""
    reference_scores: Literal["precompute", "on-the-fly"] = "precompute"
    """Score the pairs with the reference once and store the scores, or at every step beside the policy."""
    lora: Lora | None = None
    """Train low-rank adapters instead of all weights."""

    @model_validator(mode="after")
    def _smoothing_applies(self) -> Self:
        if self.label_smoothing and self.loss not in ("sigmoid", "robust"):
            raise ValueError(
                f"labelSmoothing {self.label_smoothing} has no effect with loss {self.loss}: use sigmoid or robust"
            )
        return self

    def row_schemas(self) -> Mapping[str, str]:
        return {"data": "preference"}

    def final_metrics(self) -> tuple[str, ...]:
        held_out = ("evalLoss", "evalAccuracy", "evalMargin") if self.data.eval else ()
        return (*held_out, "parameters")

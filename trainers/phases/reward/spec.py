"""What a user can set for reward modelling."""

from collections.abc import Mapping

from pydantic import Field

from trainers.spec import Lora, ModelRef, TrainData, TrainingSpec

HELD_OUT = (
    "evalLoss", "evalAccuracy", "evalMargin", "evalCalibrationError", "lengthBaselineAccuracy", "rewardMean",
    "rewardStd", "lengthCorrelation",
)  # fmt: skip
"""Metrics of held-out pairs."""


class RewardSpec(TrainingSpec):
    """Bradley-Terry reward model on `{"prompt", "chosen", "rejected"}` rows."""

    model: ModelRef | None = None
    """Model whose backbone it starts from; the run's model unless set."""
    data: TrainData
    """Preference pairs."""
    use_margin: bool = False
    """Require the rows' `margin` column: by how much chosen must win (Llama 2, Touvron et al. 2023)."""
    centering: float = Field(default=0.0, ge=0)
    """Weight of mean((r_chosen + r_rejected)^2), which keeps scores around zero (arXiv 2312.09244, eq. 2); 0.01 is common."""
    lm_weight: float = Field(default=0.0, ge=0)
    """Weight of a language-model loss on the chosen response, which keeps what the backbone knows about content."""
    lora: Lora | None = None
    """Train low-rank adapters and the score head instead of all weights."""

    def row_schemas(self) -> Mapping[str, str]:
        return {"data": "preference with margin" if self.use_margin else "preference"}

    def final_metrics(self) -> tuple[str, ...]:
        return (*HELD_OUT, "parameters") if self.data.eval else ("parameters",)

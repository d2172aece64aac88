"""What a user can set for supervised fine-tuning."""

from collections.abc import Mapping
from typing import Literal

from trainers.spec import Lora, ModelRef, TrainData, TrainingSpec


class SftSpec(TrainingSpec):
    """Supervised fine-tuning on `{"prompt", "response"}` rows or chat `messages`."""

    model: ModelRef | None = None
    """Model to start from; the run's model unless set."""
    data: TrainData
    """Rows."""
    loss_on: Literal["responses", "everything"] = "responses"
    """Train on responses (assistant turns) only, or on prompts too."""
    lora: Lora | None = None
    """Train low-rank adapters instead of all weights."""

    def row_schemas(self) -> Mapping[str, str]:
        return {"data": "sft"}

    def final_metrics(self) -> tuple[str, ...]:
        return ("evalLoss", "parameters") if self.data.eval else ("parameters",)

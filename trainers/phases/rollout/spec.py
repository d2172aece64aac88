"""What a user can set for teacher rollouts."""

from collections.abc import Mapping
from typing import Self

from pydantic import Field, model_validator

from trainers.spec import (
    OwnServer,
    PhaseSpec,
    PromptData,
    RespondingModel,
    RewardModelRef,
    Sampling,
    check_engine,
    check_prompts,
)


class RolloutSpec(PhaseSpec):
    """Responses of a model to `{"prompt"}` rows, scored by a reward model, as `{"prompt", "teacher_response", "reward"}` rows.

    Every finished batch of responses is saved, so there is nothing to set about checkpoints.
    """

    policy: RespondingModel
    """Model that responds."""
    reward_model: RewardModelRef | None = None
    """Scores the responses; without it every reward is 0."""
    data: PromptData
    """Prompts to respond to."""
    sampling: Sampling = Sampling()
    """Generation settings."""
    server: OwnServer | None = None
    """How the phase starts a vLLM, with `sampling.engine: vllm` and no `policy.url`."""
    samples_per_prompt: int = Field(default=1, ge=1)
    """Responses per prompt."""
    teacher_top_k: int | None = Field(default=None, ge=1, le=4096)
    """Keep the policy's log-probabilities of so many likeliest next tokens, and of all others together, beside every response token, at temperature 1: distillation on such traces needs no teacher. 64 take about 330 bytes a token."""

    @model_validator(mode="after")
    def _answers_each_prompt(self) -> Self:
        for i, source in enumerate(self.data.prompts):
            if source.weight is not None or source.epochs != 1:
                raise ValueError(
                    f"data.prompts[{i}]: every prompt is answered samplesPerPrompt times: no weight, no epochs"
                )
        check_engine([self.sampling], [("policy", self.policy)], self.server)
        check_prompts(self.server, "data", self.data, self.sampling, scored=self.teacher_top_k is not None)
        return self

    @property
    def starts_server(self) -> bool:
        return self.sampling.engine == "vllm" and self.policy.url is None

    def row_schemas(self) -> Mapping[str, str]:
        return {"data": "prompt"}

    def final_metrics(self) -> tuple[str, ...]:
        found = ("responses", "rewardMean", "rewardStd", "tokensMean", "endedShare")
        if self.sampling.max_new_tokens > 1:
            return found
        checked = ("promptTokensMin", "promptTokensMean", "promptTokensMax", "unknownTokens")
        return (*found, *checked, *(["rewardModelSameTokens"] if self.reward_model else []))

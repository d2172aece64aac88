"""What the critic starts from."""

from trainers.contract import BadInput
from trainers.core.classifiers import RewardModel, TextClassifier
from trainers.core.context import PhaseContext
from trainers.core.models import LoadedModel
from trainers.core.reward_models import load_value_model, new_reward_model
from trainers.core.rewards import check_reward_scoring
from trainers.core.vocabulary import vocabulary_of
from trainers.phases.ppo.spec import PpoSpec
from trainers.vocabulary import other_tokens


def load_critic(ctx: PhaseContext, spec: PpoSpec, policy: LoadedModel, reward_model: RewardModel) -> LoadedModel:
    """The model named for it; else the reward model, if it reads the policy's tokens; else the policy with a fresh head.

    Raises BadInput if the one named reads other tokens.
    """
    if spec.critic is not None:
        critic = load_value_model(ctx, spec.critic)
        if (problem := _other_tokens(policy, critic)) is not None:
            raise BadInput(f"critic: it cannot read the policy's tokens: {problem}")
        return critic
    reason = _cannot_start_from(policy, reward_model)
    if reason is None:
        return load_value_model(ctx, spec.reward_model)
    if ctx.workers.is_main:
        print(f"the critic starts from the policy with a fresh head: {reason}")
    critic, _ = new_reward_model(ctx, spec.policy, None)
    check_reward_scoring(critic, ctx.workers)
    return critic


def _cannot_start_from(policy: LoadedModel, reward_model: RewardModel) -> str | None:
    if isinstance(reward_model, TextClassifier):
        return f"reward models of type {reward_model.model.config.model_type} score a text as a whole"
    problem = _other_tokens(policy, reward_model)
    return None if problem is None else f"the reward model reads other tokens ({problem})"


def _other_tokens(policy: LoadedModel, reader: LoadedModel) -> str | None:
    return other_tokens(vocabulary_of(policy.tokenizer), vocabulary_of(reader.tokenizer))

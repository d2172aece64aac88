"""What the critic starts from."""

from trainers.contract import BadInput
from trainers.core.classifiers import RewardModel, TextClassifier
from trainers.core.context import PhaseContext
from trainers.core.models import LoadedModel
from trainers.core.reward_models import load_value_model, new_reward_model
from trainers.core.rewards import check_reward_scoring
from trainers.core.vocabulary import other_ids
from trainers.phases.ppo.spec import PpoSpec


def load_critic(ctx: PhaseContext, spec: PpoSpec, policy: LoadedModel, reward_model: RewardModel) -> LoadedModel:
    """The model named for it; else the reward model, if it reads the policy's tokens; else the policy with a fresh head.

    Raises BadInput if the one named reads other tokens.
    """
    if spec.critic is not None:
        critic = load_value_model(ctx, spec.critic)
        if (problem := other_ids(policy.tokenizer, critic.tokenizer)) is not None:
            raise BadInput(f"critic: it must read the policy's tokens, but {problem}")
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
    problem = other_ids(policy.tokenizer, reward_model.tokenizer)
    return None if problem is None else f"the reward model reads other tokens ({problem})"

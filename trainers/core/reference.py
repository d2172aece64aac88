"""The model that a policy is held close to while it is trained."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import torch

from trainers.contract import BadInput
from trainers.core.context import PhaseContext
from trainers.core.models import LoadedModel, load_causal_lm
from trainers.core.scoring import check_scoring
from trainers.core.step import in_eval_mode
from trainers.core.vocabulary import same_ids
from trainers.spec import ModelRef


@dataclass(frozen=True)
class Reference:
    """A model with weights that do not change."""

    loaded: LoadedModel
    without_training: Callable[[], AbstractContextManager[None]] = nullcontext
    """Makes the model what it was before training; for one that shares its weights with the policy."""

    @contextmanager
    def scoring(self) -> Iterator[None]:
        """Around forward passes. They have no gradients."""
        with torch.no_grad(), in_eval_mode(self.loaded.model), self.without_training():
            yield


def load_reference(
    ctx: PhaseContext, ref: ModelRef | None, start: ModelRef, policy: LoadedModel, stays: bool = True
) -> Reference:
    """The model that ``ref`` names, or the policy as it was at the start, which it has from ``start``.

    With low-rank adapters that is the policy with its adapters switched off, which costs no memory. Without, it is a
    copy, held in the same type; or the policy itself if it need not ``stay`` what it is when the policy is trained.
    Raises BadInput if the reference reads other tokens.
    """
    if ref is None and policy.adapters is not None:
        return Reference(policy, policy.adapters.disable_adapter)
    if ref is None and not stays:
        return Reference(policy)
    loaded = load_causal_lm(ctx, ref or start, frozen=True, like=policy)
    problem = same_ids(policy.tokenizer, loaded.tokenizer)
    if problem:
        raise BadInput(f"reference: its tokens are not the policy's: {problem}")
    check_scoring(loaded, ctx.workers)
    return Reference(loaded)

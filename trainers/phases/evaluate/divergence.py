"""KL between two models at the scored positions, exact over the vocabulary and never for a whole batch at once.

Names: K scored positions, V vocabulary, S sequences.
"""

from typing import Any

import torch

from trainers.core.batch import Batch
from trainers.core.head_losses import Beside
from trainers.core.scoring import Scorer, hidden_states


def divergence_sums(model: Any, reference: Any, batch: Batch) -> torch.Tensor:
    """KL(model || reference) summed over each sequence's scored tokens, in nats: (S,)."""
    beside = Beside(reference, hidden_states(reference, batch)[batch.scored_at])
    return batch.sums(Scorer(model)(batch, lambda ours, _, theirs: kl(ours, theirs), beside=beside))


def kl(ours: torch.Tensor, theirs: torch.Tensor) -> torch.Tensor:
    """KL(softmax(ours) || softmax(theirs)) over the last axis. Columns that only one has are padding and do not count."""
    width = min(ours.shape[-1], theirs.shape[-1])
    p, q = ours[..., :width].log_softmax(-1), theirs[..., :width].log_softmax(-1)
    return (p.exp() * (p - q)).masked_fill(p.exp() == 0, 0.0).sum(-1)

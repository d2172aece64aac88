"""KL between two models at the scored positions, exact over the vocabulary and never for a whole batch at once.

Names: K scored positions, V vocabulary, S sequences.
"""

from typing import Any

import torch

from trainers.core.batch import Batch
from trainers.core.scoring import CHUNK_ELEMENTS, head_logits, hidden_states


def divergence_sums(model: Any, reference: Any, batch: Batch) -> torch.Tensor:
    """KL(model || reference) summed over each sequence's scored tokens, in nats: (S,)."""
    ours = hidden_states(model, batch)[batch.scored_at]
    theirs = hidden_states(reference, batch)[batch.scored_at]
    size = max(1, CHUNK_ELEMENTS // (2 * model.get_output_embeddings().weight.shape[0]))
    parts = [
        kl(head_logits(model, ours[i : i + size]), head_logits(reference, theirs[i : i + size]))
        for i in range(0, len(ours), size)
    ]
    return batch.sums(torch.cat(parts)) if parts else torch.zeros(batch.num_sequences)


def kl(ours: torch.Tensor, theirs: torch.Tensor) -> torch.Tensor:
    """KL(softmax(ours) || softmax(theirs)) over the last axis. Columns that only one has are padding and do not count."""
    width = min(ours.shape[-1], theirs.shape[-1])
    p, q = ours[..., :width].log_softmax(-1), theirs[..., :width].log_softmax(-1)
    return (p.exp() * (p - q)).masked_fill(p.exp() == 0, 0.0).sum(-1)

"""What models say of the tokens of responses, one number for each.

Names: N responses of at most T tokens; K scored tokens of a forward pass.
"""

from collections.abc import Callable
from collections.abc import Sequence as List

import torch
from torch import nn

from trainers.core.batch import Batch, Sequence
from trainers.core.parallel import Workers
from trainers.core.scoring import target_logprobs
from trainers.core.step import Layout, scored

TokenScores = Callable[[Batch], torch.Tensor]
"""One number for each scored token: (K,)."""


def logprobs_of(scorer: nn.Module, temperature: float) -> TokenScores:
    """Log-probabilities at the temperature that responses were sampled with."""

    def scores(batch: Batch) -> torch.Tensor:
        found: torch.Tensor = scorer(batch, target_logprobs(batch, temperature))
        return found

    return scores


def score_tokens(
    workers: Workers, layout: Layout[Sequence], sequences: list[Sequence], scorers: List[TokenScores]
) -> list[torch.Tensor]:
    """Each scorer's numbers for all response tokens, (N, T) each and the same on all ranks, which share the work."""

    def score(some: list[Sequence], batch: Batch) -> list[torch.Tensor]:
        scores = torch.stack([scorer(batch) for scorer in scorers]).cpu()
        return list(scores.split([sequence.num_scored for sequence in some], dim=1))

    tokens = torch.zeros(len(scorers), len(sequences), max(s.num_scored for s in sequences))
    for i, scores in enumerate(scored(workers, layout, sequences, score)):
        tokens[:, i, : scores.shape[1]] = scores
    return list(tokens)


def token_mask(sequences: list[Sequence]) -> torch.Tensor:
    """(N, T), true at real tokens."""
    lengths = torch.tensor([s.num_scored for s in sequences])
    return torch.arange(int(lengths.max())) < lengths[:, None]

"""From logits to tokens: temperature, top-k, nucleus, and one draw per row by one uniform number.

Names: B rows, V vocabulary.
"""

import torch

from trainers.spec import Sampling

BLOCK = 128
"""Tokens whose weights are summed before a running sum is made."""
LIKELIEST = 256
"""Tokens among which a nucleus is looked for first."""
WIDENING = 8
"""Times as many are looked at next."""


def sample(
    logits: torch.Tensor,
    sampling: Sampling,
    uniforms: torch.Tensor,
    num_known: int | None = None,
    fixed: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Choose a token per row: logits (B, V) in fp32 and uniforms (B,) in [0, 1) to ids and log-probabilities, (B,) each.

    Temperature 0 is greedy, and only ids below ``num_known`` are chosen. Log-probabilities are the model's own: at
    temperature 1, of all V, whatever was cut off before the draw. Logits that are no numbers give some that are none.
    ``fixed``: the same operations whatever the logits, without a look at them.
    """
    top = logits.amax(-1, keepdim=True)
    weights = (logits - top).exp_()
    whole = weights.sum(-1).log()
    known = logits if num_known in (None, logits.shape[-1]) else logits[:, :num_known]
    if sampling.temperature == 0:
        token = known.argmax(-1)
    else:
        cut = warped(known, sampling, fixed)
        token = drawn(weights if cut is logits else (cut - cut.amax(-1, keepdim=True)).exp_(), uniforms)
    return token, (logits.gather(-1, token[:, None]) - top).squeeze(-1) - whole


def drawn(weights: torch.Tensor, uniforms: torch.Tensor) -> torch.Tensor:
    """The first token up to which a row's weights sum up to more than a share ``uniforms`` of them all: (B,).

    First a block of tokens is drawn, then a token of it: a running sum over the vocabulary, in doubles because its tail
    would be lost otherwise, takes ten times as long. A token without weight is never drawn.
    """
    lacking = -weights.shape[-1] % BLOCK
    whole = torch.nn.functional.pad(weights, (0, lacking)) if lacking else weights  # it copies where nothing lacks, too
    blocks = whole.unflatten(-1, (-1, BLOCK))
    block, within = _first_above(blocks.sum(-1), uniforms)
    token, _ = _first_above(blocks[torch.arange(len(weights), device=weights.device), block], within)
    return (block * BLOCK + token).clamp(max=weights.shape[-1] - 1)  # weights that are no numbers get there


def _first_above(weights: torch.Tensor, shares: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Where running sums first exceed a share of the whole, and how far into that entry the share lies: (B,) each."""
    sums = weights.double().cumsum(-1)
    wanted = shares[:, None].double() * sums[:, -1:]
    found = torch.searchsorted(sums, wanted, right=True).clamp(max=weights.shape[-1] - 1)
    entry = weights.gather(-1, found).double()
    within = (wanted - (sums.gather(-1, found) - entry)) / entry
    return found.squeeze(-1), within.squeeze(-1).clamp(0, 1 - 2**-53)


def warped(logits: torch.Tensor, sampling: Sampling, fixed: bool = False) -> torch.Tensor:
    """Logits after temperature, then top-k, then nucleus (top-p), as transformers orders them: (B, V)."""
    if sampling.temperature != 1:
        logits = logits / sampling.temperature
    if 0 < sampling.top_k < logits.shape[-1]:
        floor = logits.topk(sampling.top_k).values[:, -1:]
        logits = logits.masked_fill(logits < floor, float("-inf"))
    if sampling.top_p < 1:
        logits = _nucleus(logits, sampling.top_p, logits.shape[-1] if fixed else LIKELIEST)
    return logits


def _nucleus(logits: torch.Tensor, top_p: float, fewest: int) -> torch.Tensor:
    """Keep the smallest set of likeliest tokens whose probability reaches ``top_p`` (at least one token).

    Looked for among the ``fewest``, then among more for the rows that lack some: to put a whole vocabulary in order takes
    longer than a small model's step.
    """
    whole = logits.logsumexp(-1, keepdim=True)
    kept = torch.full_like(logits, float("-inf"))
    rows, count = torch.arange(len(logits), device=logits.device), min(fewest, logits.shape[-1])
    while True:
        ordered, index = logits[rows].topk(count)
        probabilities = (ordered - whole[rows]).exp()
        outside = probabilities.cumsum(-1) - probabilities >= top_p
        kept[rows] = kept[rows].scatter(-1, index, ordered.masked_fill(outside, float("-inf")))
        if count == logits.shape[-1]:
            return kept
        rows, count = rows[~outside[:, -1]], min(WIDENING * count, logits.shape[-1])
        if not len(rows):
            return kept

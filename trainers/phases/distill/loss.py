"""Divergences between a teacher's and a student's next-token distributions, over the whole vocabulary.

Names: p teacher, q student, k positions, V shared vocabulary.
"""

import math
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from trainers.core.head_losses import LogitsFn
from trainers.core.top_k import bucket_logits


def generalized_jsd(
    student: torch.Tensor, teacher: torch.Tensor, beta: float, temperature: float = 1.0
) -> torch.Tensor:
    """Generalized Jensen-Shannon divergence of each position in nats: logits (k, V) and (k, V) to (k,).

    ``beta`` 0 is KL(p || q), 1 is KL(q || p), between them beta KL(p || m) + (1 - beta) KL(q || m) with
    m = beta p + (1 - beta) q (Agarwal et al. 2024). It goes to 0 near its ends and jumps there: beta 0.01 is about a
    hundredth of beta 0. Temperature divides both logits. Only the student gets a gradient.
    """
    return jsd_and_kl(student, teacher, beta, temperature)[0]


def jsd_and_kl(
    student: torch.Tensor, teacher: torch.Tensor, beta: float, temperature: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """The divergence of :func:`generalized_jsd` and, without a gradient, KL(p || q): (k,) each."""
    found: tuple[torch.Tensor, torch.Tensor] = _GeneralizedJsd.apply(student, teacher, beta, temperature)
    return found


def top_k_divergence(ids: torch.Tensor, log_probs: torch.Tensor, known: int, beta: float) -> LogitsFn:
    """Of stored scores of a teacher, (K, k) and (K, k + 1): :func:`generalized_jsd` of k tokens and the rest as one.

    For the student's logits: the divergence to train on, KL(teacher || student), and the student's and the teacher's
    probability of the k tokens, (k, 4). Merging outcomes lowers a divergence, so it is at most the one of the whole
    vocabulary, and equal to it where k is all of it. ``known``: ids below this are what the teacher chose among.
    """

    def fn(logits: torch.Tensor, at: slice) -> torch.Tensor:
        ours, theirs = bucket_logits(logits[:, :known], ids[at]), log_probs[at]
        ours = ours.masked_fill(theirs == -torch.inf, -torch.inf)  # places that a teacher had no token for
        loss, kl = jsd_and_kl(ours, theirs, beta)
        masses = [1 - some.detach().softmax(-1)[:, -1] for some in (ours, theirs)]
        return torch.stack([loss, kl, *masses], dim=-1)

    return fn


def shared(student: torch.Tensor, teacher: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Both logits without the columns that only one has."""
    width = min(student.shape[-1], teacher.shape[-1])
    return student[:, :width], teacher[:, :width]


class _GeneralizedJsd(torch.autograd.Function):
    """The gradient is written down instead of recorded: recording keeps about five (k, V) tensors, this one.

    With g = dD/dq, softmax turns it into q (g - sum q g); up to a constant, g is -p/q for KL(p || q), log(q/p) for
    KL(q || p), and (1 - beta) log(q/m) for the rest.
    """

    @staticmethod
    def forward(
        ctx: Any, student: torch.Tensor, teacher: torch.Tensor, beta: float, temperature: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        log_q, log_p = ((z if temperature == 1 else z / temperature).log_softmax(-1) for z in (student, teacher))
        value, slope = _value_and_slope(log_p, log_q, beta)
        ctx.save_for_backward(slope if temperature == 1 else slope.div_(temperature))
        kl = value.clone() if beta == 0 else _kl(log_p.exp(), log_p, log_q)[0]
        ctx.mark_non_differentiable(kl)
        return value, kl

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        (slope,) = ctx.saved_tensors
        return grads[0].unsqueeze(-1) * slope, None, None, None


def _value_and_slope(log_p: torch.Tensor, log_q: torch.Tensor, beta: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Divergence (k,) and its gradient with respect to the student's scaled logits (k, V).

    In place and in this order: such tensors are the largest of a step, and beside the two given no more than three are there.
    """
    if beta == 0:
        p = log_p.exp()
        return _kl(p, log_p, log_q)[0], log_q.exp().sub_(p)
    if beta == 1:
        q = log_q.exp()
        value, terms = _kl(q, log_q, log_p)
        return value, terms.addcmul_(q, value.unsqueeze(-1), value=-1)
    # Of logarithms: where p and q both underflow, log(beta p + (1 - beta) q) is log 0.
    log_m = torch.logaddexp(log_p + math.log(beta), log_q + math.log1p(-beta))
    kl_p = _kl(log_p.exp(), log_p, log_m)[0]
    q = log_q.exp()
    kl_q, terms = _kl(q, log_q, log_m)
    slope = terms.addcmul_(q, kl_q.unsqueeze(-1), value=-1).mul_(1 - beta)
    return beta * kl_p + (1 - beta) * kl_q, slope


def _kl(p: torch.Tensor, log_p: torch.Tensor, log_q: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """KL(p || q) of each position (k,) and its terms (k, V). What is impossible under p adds 0, whatever q says of it."""
    terms = (log_p - log_q).mul_(p)
    terms.masked_fill_(p == 0, 0.0)
    return terms.sum(-1), terms

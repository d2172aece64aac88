"""Divergences between a teacher's and a student's next-token distributions, over the whole vocabulary.

Names: p teacher, q student, k positions, V shared vocabulary.
"""

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


PIECE_ELEMENTS = {"cpu": 2**17}
"""Logits of one model that are worked on at once: what lies in a processor's cache is looked at ten times."""
PIECES = 8
"""Elsewhere: so that what is made of them takes less memory than they do."""


class _GeneralizedJsd(torch.autograd.Function):
    """The gradient is written down instead of recorded: recording keeps about five (k, V) tensors, this one.

    With g = dD/dq, softmax turns it into q (g - sum q g); up to a constant, g is -p/q for KL(p || q), log(q/p) for
    KL(q || p), and (1 - beta) log(q/m) for the rest.
    """

    @staticmethod
    def forward(
        ctx: Any, student: torch.Tensor, teacher: torch.Tensor, beta: float, temperature: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        slope = torch.empty_like(student)
        at_once = PIECE_ELEMENTS.get(student.device.type, student.numel() // PIECES)
        rows = max(1, at_once // student.shape[-1])
        pieces = zip(student.split(rows), teacher.split(rows), slope.split(rows), strict=True)
        values = [_Piece(z, of_teacher, temperature).formed(beta, out) for z, of_teacher, out in pieces]
        value, kl = (torch.cat(column) for column in zip(*values, strict=True))
        ctx.save_for_backward(slope)
        ctx.mark_non_differentiable(kl)
        return value, kl

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        (slope,) = ctx.saved_tensors
        return grads[0].unsqueeze(-1) * slope, None, None, None


class _Piece:
    """Some positions' two distributions, p of the teacher and q of the student, and their logarithms: (k, V) each."""

    def __init__(self, student: torch.Tensor, teacher: torch.Tensor, temperature: float) -> None:
        logits = student, teacher
        # Without any outcome that is impossible nothing has to be left out of sums. On a device the answer would be waited for.
        self.whole = student.device.type == "cpu" and all(bool((z.amin(-1) > -torch.inf).all()) for z in logits)
        q, p = (z if temperature == 1 else z / temperature for z in logits)
        self.log_q, self.log_p, self.q, self.p = q.log_softmax(-1), p.log_softmax(-1), q.softmax(-1), p.softmax(-1)
        self.temperature = temperature

    def formed(self, beta: float, slope: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Divergence and KL(p || q), (k,) each; the first one's gradient by the student's logits, (k, V), goes into ``slope``."""
        kl = self._kl(self.p, self.log_p, self.log_q)[0]
        value = self._value(beta, kl, slope)
        if self.temperature != 1:
            slope.div_(self.temperature)
        return value, kl

    def _value(self, beta: float, kl: torch.Tensor, slope: torch.Tensor) -> torch.Tensor:
        if beta == 0:
            torch.sub(self.q, self.p, out=slope)
            return kl
        if beta == 1:
            value, terms = self._kl(self.q, self.log_q, self.log_p)
            torch.addcmul(terms, self.q, value.unsqueeze(-1), value=-1, out=slope)
            return value
        # Where p and q both underflow, what they are multiplied with does not matter, but has to be a number.
        mixed = (self.p * beta).add_(self.q, alpha=1 - beta)
        log_m = mixed.clamp_(min=torch.finfo(mixed.dtype).tiny).log_()
        kl_p = self._kl(self.p, self.log_p, log_m)[0]
        kl_q, terms = self._kl(self.q, self.log_q, log_m)
        torch.addcmul(terms, self.q, kl_q.unsqueeze(-1), value=-1, out=slope).mul_(1 - beta)
        return beta * kl_p + (1 - beta) * kl_q

    def _kl(self, p: torch.Tensor, log_p: torch.Tensor, log_q: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """KL(p || q) of each position (k,) and its terms (k, V). What is impossible under p adds 0, whatever q says of it."""
        terms = (log_p - log_q).mul_(p)
        if not self.whole:
            terms.masked_fill_(p == 0, 0.0)
        return terms.sum(-1), terms

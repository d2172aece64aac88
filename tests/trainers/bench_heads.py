"""Time and peak memory of losses on a language head: ours, what autograd does, and torch's own fused cross-entropy.

``make bench-heads`` runs every form in a process of its own, on one thread, at a size that fits a small machine, and
puts beside it what the same counting gives at 8,192 positions, width 4,096 and 131,072 tokens.
"""

import multiprocessing
import resource
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace

import torch
from torch import nn
from torch.nn.functional import linear, linear_cross_entropy
from torch.utils.checkpoint import checkpoint

from trainers.core import head_losses
from trainers.core.head_losses import Beside, head_loss
from trainers.core.scoring import target_logprobs
from trainers.phases.distill.loss import generalized_jsd
from trainers.phases.distill.train import divergence

K, H, V, ROWS = 1024, 512, 16384, 128
LARGE = (8192, 4096, 131072, 512)
"""On paper; 512 positions of so many tokens are a chunk of 2**26 logits."""


@dataclass(frozen=True)
class Form:
    loss: Callable[["Inputs"], torch.Tensor]
    products: int
    """Matrix products over all positions."""
    whole: float = 0
    """Tensors of all logits alive at once."""
    chunks: float = 0
    """Tensors of one chunk's logits."""
    weights: int = 1
    """Tensors like the head's matrix, beside it: its gradient."""

    def paper(self, count: int, width: int, vocabulary: int, rows: int) -> tuple[float, float]:
        """(bytes, operations)."""
        held = self.whole * count * vocabulary + self.chunks * rows * vocabulary + self.weights * vocabulary * width
        return 4.0 * (held + 2 * count * width), 2.0 * self.products * count * width * vocabulary


class Inputs:
    def __init__(self) -> None:
        torch.manual_seed(0)
        self.head, self.teacher = nn.Linear(H, V, bias=False), nn.Linear(H, V, bias=False).requires_grad_(False)
        self.hidden, self.theirs = torch.randn(K, H, requires_grad=True), torch.randn(K, H)
        self.targets = torch.randint(0, V, (K,))
        text = SimpleNamespace()
        config = SimpleNamespace(get_text_config=lambda: text)
        self.model, self.teacher_model = (
            SimpleNamespace(get_output_embeddings=lambda head=head: head, config=config)
            for head in (self.head, self.teacher)
        )

    def logprobs(self):
        return target_logprobs(SimpleNamespace(target_ids=self.targets))

    def plain_logprobs(self, hidden: torch.Tensor, at: slice) -> torch.Tensor:
        logits = linear(hidden, self.head.weight)
        return logits.gather(-1, self.targets[at, None]).squeeze(-1) - logits.logsumexp(-1)

    def plain_jsd(self, hidden: torch.Tensor, at: slice) -> torch.Tensor:
        with torch.no_grad():
            theirs = self.teacher(self.theirs[at])
        return generalized_jsd(linear(hidden, self.head.weight), theirs, 0.5)


def ours(given: Inputs) -> torch.Tensor:
    return head_loss(given.model, given.hidden, given.logprobs(), lambda v, _: -v.sum())[0]


def ours_by_pairs(given: Inputs) -> torch.Tensor:
    sizes = [ROWS // 2] * (2 * K // ROWS)
    return head_loss(given.model, given.hidden, given.logprobs(), lambda v, _: v.sum().square(), sizes)[0]


def ours_by_long_pairs(given: Inputs) -> torch.Tensor:
    return head_loss(given.model, given.hidden, given.logprobs(), lambda v, _: v.sum().square(), [K // 2] * 2)[0]


def ours_jsd(given: Inputs) -> torch.Tensor:
    beside = Beside(given.teacher_model, given.theirs)
    return head_loss(given.model, given.hidden, divergence(0.5, 1.0), lambda v, _: v.sum(), beside=beside)[0]


def again_in_backward(fn: Callable, hidden: torch.Tensor) -> torch.Tensor:
    chunks = [slice(i, i + ROWS) for i in range(0, K, ROWS)]
    return torch.cat([checkpoint(fn, hidden[at], at, use_reentrant=False) for at in chunks]).sum()


def torchs(given: Inputs) -> torch.Tensor:
    options = nn.LinearCrossEntropyOptions(batch_chunk_size=ROWS, chunking_method=None)
    return linear_cross_entropy(given.hidden, given.head.weight, given.targets, reduction="sum", options=options)


ALL = slice(0, K)
FORMS = {
    "logprobs: ours": Form(ours, 3, chunks=2),
    "logprobs: ours, pairs that fit a chunk": Form(ours_by_pairs, 3, chunks=2),
    "logprobs: ours, pairs of two chunks": Form(ours_by_long_pairs, 4, chunks=2),
    "logprobs: autograd": Form(lambda g: g.plain_logprobs(g.hidden, ALL).sum(), 3, whole=4),
    "logprobs: chunks, checkpointed": Form(lambda g: again_in_backward(g.plain_logprobs, g.hidden), 4, 0, 4, 2),
    "logprobs: torch's, chunks": Form(torchs, 3, chunks=2),
    "jsd: ours": Form(ours_jsd, 4, chunks=10),
    "jsd: autograd": Form(lambda g: g.plain_jsd(g.hidden, ALL).sum(), 4, whole=10),
    "jsd: chunks, checkpointed": Form(lambda g: again_in_backward(g.plain_jsd, g.hidden), 6, 0, 10, 2),
}


def measure(name: str) -> tuple[float, float]:
    """CPU-seconds, and the peak of resident memory above what the inputs take, in MiB."""
    torch.set_num_threads(1)
    head_losses.CHUNK_ELEMENTS = ROWS * V
    given = Inputs()
    linear(given.hidden[:8], given.head.weight).sum().backward()  # what libraries set up once
    seconds = []
    for attempt in range(3):
        given.hidden.grad = given.head.weight.grad = None
        before, start = resident(), time.process_time()
        FORMS[name].loss(given).backward()
        seconds.append(time.process_time() - start)
        if attempt == 0:
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
    return min(seconds), peak / 2**20


def resident() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


def main() -> None:
    count, width, vocabulary, rows = LARGE
    print(f"{K:,} positions x {H:,} x {V:,} tokens in chunks of {ROWS}, one thread; on paper {count:,} x {width:,} x "
          f"{vocabulary:,} in chunks of {rows}")  # fmt: skip
    print(f"{'':40}{'CPU-s':>8}{'peak':>12}{'by count':>12}{'on paper':>12}{'operations':>14}")
    with multiprocessing.get_context("fork").Pool(1, maxtasksperchild=1) as processes:
        for (name, form), (seconds, peak) in zip(FORMS.items(), processes.imap(measure, FORMS), strict=True):
            large, operations = form.paper(*LARGE)
            counted = form.paper(K, H, V, ROWS)[0] / 2**20
            print(f"{name:40}{seconds:8.2f}{peak:8.0f} MiB{counted:8.0f} MiB{large / 2**30:8.1f} GiB"
                  f"{operations / 1e12:8.0f} TFLOP")  # fmt: skip


if __name__ == "__main__":
    main()

"""The rollout engine: batched sampling with a key-value cache, shared by ppo, rollout, distill and evaluate.

Own code, because a response must be a function of explicit random numbers (transformers' ``generate`` draws from the
global generator, so a resumed run would go another way), because rows that end make room for new ones, and because
latency needs the time of every token.

Token t of response i is chosen by one uniform number u[i, t] through the inverse of the cumulative distribution. So a
response does not depend on which other responses are in its batch, or on how many processes share the work (but for
rounding in the logits).

Names: N responses in all, B rows side by side, V vocabulary.
"""

import time
from collections import deque
from collections.abc import Sequence as List
from dataclasses import dataclass, field
from typing import Any

import torch

from trainers.contract import Diverged
from trainers.core.attention import with_a_cache
from trainers.core.compiling import uncompiled
from trainers.core.graphs import Record, graphs_for, wide
from trainers.core.lean import lean_layers
from trainers.core.packed_linears import packed_linears
from trainers.core.padded import Padded
from trainers.core.sampling import sample
from trainers.core.sharding import computes_on
from trainers.core.slots import Slots, fits_slots
from trainers.core.step import in_eval_mode
from trainers.spec import Sampling

SHARE = 8
"""Rows that have ended are replaced once they are an eighth: reading one prompt alone takes nearly as long as several."""
HALF = 2
"""Where steps are graphs, which are recorded anew for fewer rows, and none wait: rows move up once a half is idle."""


@dataclass
class Response:
    ids: list[int]
    """Generated tokens, the end token included."""
    ended: bool
    """Whether it stopped by itself rather than at the length limit."""
    logprobs: list[float]
    """Of each token: the model's own of its whole vocabulary, however it was sampled; at temperature 1 unless asked otherwise."""
    times: list[float] = field(default_factory=list)
    """Seconds from the start to each token."""


@torch.no_grad()
def generate(
    model: Any,
    prompts: List[list[int]],
    sampling: Sampling,
    stop_ids: frozenset[int],
    generator: torch.Generator | None = None,
    pad_id: int = 0,
    keep_times: bool = False,
    uniforms: torch.Tensor | None = None,
    num_known: int | None = None,
    tempered: bool = False,
    record: Record | None = None,
) -> list[Response]:
    """Respond to prompts (token ids, none empty). Answers come in the order of the prompts.

    What is random comes from ``uniforms``, (N, max_new_tokens) in [0, 1), or is drawn from ``generator`` on whatever
    device that lives; greedy sampling (temperature 0) needs neither. The model is in eval mode meanwhile, in which
    gradient checkpointing does not switch the cache off. Only ids below ``num_known`` are chosen. ``tempered``:
    log-probabilities are those at the temperature of the sampling, unless that is 0, still of the whole vocabulary.
    ``record``: what makes a graph of a step (:mod:`trainers.core.graphs`); without it a step launches one operation after
    the other. Raises Diverged when logits are not finite.
    """
    if uniforms is None:
        uniforms = _draw(generator, len(prompts), sampling)
    if not prompts:
        return []
    rows = min(len(prompts), sampling.batch_size)
    with with_a_cache(model), uncompiled(), in_eval_mode(model), lean_layers(model), packed_linears(model, rows):
        run = _Run(model, prompts, sampling, stop_ids, uniforms, pad_id, num_known, tempered, record)
        run.to_the_end()
    return run.responses(keep_times)


def _draw(generator: torch.Generator | None, count: int, sampling: Sampling) -> torch.Tensor:
    if sampling.temperature == 0:
        return torch.zeros(count, sampling.max_new_tokens)
    assert generator is not None, "sampling needs a generator or its uniforms"
    shape = (count, sampling.max_new_tokens)
    return torch.rand(shape, generator=generator, device=generator.device, dtype=torch.float64)


class _Run:
    """Responses on their way, as tensors of B rows: no token of any is looked at in Python before the end."""

    def __init__(
        self,
        model: Any,
        prompts: List[list[int]],
        sampling: Sampling,
        stop_ids: frozenset[int],
        uniforms: torch.Tensor,
        pad_id: int,
        num_known: int | None,
        tempered: bool,
        record: Record | None = None,
    ) -> None:
        self.prompts, self.sampling, self.num_known = prompts, sampling, num_known
        self.divisor = (sampling.temperature or 1.0) if tempered else 1.0
        """Of logits, before they are sampled from and told of: the draw has none left to divide by then."""
        self.drawn = sampling if self.divisor == 1 else sampling.model_copy(update={"temperature": 1.0})
        self.device = computes_on(model)
        self.uniforms = uniforms.to(self.device)
        self.stop_ids = stop_ids
        self.stops = torch.tensor(sorted(stop_ids), device=self.device)
        # Prompts of like length go together, so little is padded, and those that are alike side by side.
        self.waiting = deque(sorted(range(len(prompts)), key=lambda i: (len(prompts[i]), prompts[i])))
        self.made = torch.full((len(prompts), sampling.max_new_tokens + 1), -1, device=self.device)
        """(N, T + 1) tokens; what rows that have ended go on to sample falls into the last column."""
        self.logprobs = torch.zeros(self.made.shape, device=self.device)
        self.began = [0] * len(prompts)
        """Steps before each response's first."""
        self.times: list[float] = []
        self.finite = torch.tensor(True, device=self.device)
        count = min(len(prompts), sampling.batch_size)
        self.longest = max(map(len, prompts)) + sampling.max_new_tokens - 1
        """Tokens of a row that are read: its last one never is."""
        graphs = graphs_for(model, sampling, record)
        if graphs is not None:
            self.batch: Slots | Padded = Slots(model, count, wide(self.longest), whole=True)
        else:
            self.batch = Slots(model, count, self.longest) if fits_slots(model) else Padded(model, pad_id)
        self.graphs = graphs  # behind what may lie in their memory, and so given back after it
        empty = torch.zeros(count, dtype=torch.int64, device=self.device)
        self.owner, self.token, self.position, self.count = (empty.clone() for _ in range(4))
        """Of each row: which response it is, its last token, that one's position, and how many it has made."""
        self.going = torch.zeros(count, dtype=torch.bool, device=self.device)
        self.width = 0
        """Up to which position any row has come, or a little more."""

    def to_the_end(self) -> None:
        began = time.perf_counter()
        self._replace()
        while len(self.going):
            self._advance()
            going = int(self.going.sum())  # the one look at the device in a step
            self.times.append(time.perf_counter() - began)
            if (len(self.going) - going) * self._share() >= len(self.going):
                self._replace()
        if not self.finite:
            raise Diverged(
                "the logits that responses are sampled from are not finite: a weight is no number, or too large"
            )

    def responses(self, keep_times: bool) -> list[Response]:
        found = []
        lengths = (self.made[:, :-1] >= 0).sum(-1).tolist()
        columns = (self.made.tolist(), self.logprobs.tolist(), lengths, self.began)
        for made, logprobs, length, began in zip(*columns, strict=True):
            ids = made[:length]
            times = self.times[began : began + length] if keep_times else []
            found.append(Response(ids, ids[-1] in self.stop_ids, logprobs[:length], times))
        return found

    def _advance(self) -> None:
        """One token more for every row."""
        if self.graphs is None:
            self._step(self.width)
        else:
            buffers = (
                self.owner,
                self.token,
                self.position,
                self.count,
                self.going,
                self.finite,
                self.made,
                self.logprobs,
            )
            self.graphs.run(self._step, self.width, buffers)
        self.width = min(self.width + 1, self.longest)

    def _step(self, width: int) -> None:
        """Over tensors that stay where they are, without a look at any: but for the width all steps are the same."""
        logits = self.batch.logits(self.token, self.position, width).float()
        last = self.sampling.max_new_tokens - 1
        uniforms = self.uniforms[self.owner, self.count.clamp(max=last)]
        if self.divisor != 1:
            logits /= self.divisor
        token, logprobs = sample(logits, self.drawn, uniforms, self.num_known, fixed=self.graphs is not None)
        self.token.copy_(token)
        self.finite &= logprobs.isfinite().all()
        place = self.owner, torch.where(self.going, self.count, last + 1)
        self.made[place], self.logprobs[place] = token, logprobs
        # Not isin, which puts tokens in order and looks at them where there are ten ends or more.
        self.going &= (token[:, None] != self.stops).all(-1) & (self.count < last)
        self.position += self.going
        self.count += self.going

    def _share(self) -> int:
        return SHARE if self.graphs is None or self.waiting else HALF

    def _replace(self) -> None:
        """New responses in the place of rows that have ended; where none wait, the last rows move up."""
        free = (~self.going).nonzero().flatten().tolist()
        if self.batch.refills or len(free) == len(self.going):
            taken = [(row, self.waiting.popleft()) for row in free[: len(self.waiting)]]
            self._admit(taken)
            free = free[len(taken) :]
        if free and (self.graphs is None or len(free) * HALF >= len(self.going)):
            self._close(free)
        self.width = int(self.position.max()) + 1 if len(self.going) else 0

    def _admit(self, taken: list[tuple[int, int]]) -> None:
        if not taken:
            return
        rows, owners = map(list, zip(*taken, strict=True))
        prompts = [self.prompts[i] for i in owners]
        self.batch.fill(rows, prompts)
        for i in owners:
            self.began[i] = len(self.times)
        self.owner[rows] = torch.tensor(owners, device=self.device)
        self.token[rows] = torch.tensor([prompt[-1] for prompt in prompts], device=self.device)
        self.position[rows] = torch.tensor([len(prompt) - 1 for prompt in prompts], device=self.device)
        self.count[rows], self.going[rows] = 0, True

    def _close(self, free: list[int]) -> None:
        left = len(self.going) - len(free)
        rows = torch.arange(left, device=self.device)
        last = sorted(set(range(left, len(self.going))) - set(free))
        for row, moved in zip(free, last, strict=False):
            rows[row] = moved
        self.owner, self.token, self.position = self.owner[rows], self.token[rows], self.position[rows]
        self.count, self.going = self.count[rows], self.going[rows]
        if self.graphs is not None:
            self.graphs.forget()
        if left:
            self.batch.keep(rows)

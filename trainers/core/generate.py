"""The rollout engine: batched sampling with a key-value cache, shared by ppo, rollout, distill and evaluate.

Own code, because generation must be a function of an explicit generator (transformers' ``generate`` draws from the
global one), and because latency needs the time of every token.

Names: B responses side by side, T tokens so far, V vocabulary.
"""

import time
from collections.abc import Sequence as List
from dataclasses import dataclass, field
from typing import Any

import torch

from trainers.spec import Sampling


@dataclass
class Response:
    ids: list[int]
    """Generated tokens, the end token included."""
    ended: bool
    """Whether it stopped by itself rather than at the length limit."""
    times: list[float] = field(default_factory=list)
    """Seconds from the batch's start to each token."""


@torch.no_grad()
def generate(
    model: Any,
    prompts: List[list[int]],
    sampling: Sampling,
    stop_ids: frozenset[int],
    generator: torch.Generator,
    pad_id: int = 0,
    keep_times: bool = False,
) -> list[Response]:
    """Respond to prompts (token ids). Answers come in the order of the prompts.

    Prompts of like length go together, so little is padded. The same generator state gives the same responses.
    """
    was_training = model.training
    model.eval()
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    responses: list[Response | None] = [None] * len(prompts)
    for start in range(0, len(order), sampling.batch_size):
        chosen = order[start : start + sampling.batch_size]
        batch = _Batch(model, [prompts[i] for i in chosen], sampling, stop_ids, generator, pad_id, keep_times)
        for index, response in zip(chosen, batch.run(), strict=True):
            responses[index] = response
    model.train(was_training)
    return [r for r in responses if r is not None]


class _Batch:
    """One batch on its way. Rows that ended leave it as soon as they are half of it, so the tail gets cheaper."""

    def __init__(
        self,
        model: Any,
        prompts: List[list[int]],
        sampling: Sampling,
        stop_ids: frozenset[int],
        generator: torch.Generator,
        pad_id: int,
        keep_times: bool,
    ) -> None:
        self.model, self.sampling, self.generator = model, sampling, generator
        self.keep_times = keep_times
        self.device = next(model.parameters()).device
        self.stop = torch.tensor(sorted(stop_ids), device=self.device)
        self.pad_id = pad_id
        self.responses = [Response([], False) for _ in prompts]
        self.rows = list(range(len(prompts)))
        """Which response each row of the tensors belongs to."""
        width = max(map(len, prompts))
        padded = [[pad_id] * (width - len(p)) + list(p) for p in prompts]
        self.input_ids = torch.tensor(padded, device=self.device)
        self.mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=self.device)
        self.positions = (self.mask.cumsum(-1) - 1).clamp(min=0)
        self.done = torch.zeros(len(prompts), dtype=torch.bool, device=self.device)
        self.cache: Any = None

    def run(self) -> list[Response]:
        began = time.perf_counter()
        for _ in range(self.sampling.max_new_tokens):
            tokens = sample(self._next_logits(), self.sampling, self.generator)
            now = time.perf_counter() - began
            self._store(tokens.tolist(), self.done.tolist(), now)
            self.done |= torch.isin(tokens, self.stop)
            if self._all_done():
                break
            self._extend(tokens)
        return self.responses

    def _next_logits(self) -> torch.Tensor:
        out = self.model(
            input_ids=self.input_ids,
            attention_mask=self.mask,
            position_ids=self.positions,
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
        )
        self.cache = out.past_key_values
        return out.logits[:, -1].float()

    def _store(self, tokens: list[int], done: list[bool], now: float) -> None:
        stop = set(self.stop.tolist())
        for row, token, over in zip(self.rows, tokens, done, strict=True):
            if not over:
                response = self.responses[row]
                response.ids.append(token)
                response.ended = token in stop
                if self.keep_times:
                    response.times.append(now)

    def _all_done(self) -> bool:
        count = int(self.done.sum())
        if count == len(self.rows):
            return True
        if count * 2 >= len(self.rows):
            self._pending_keep = (~self.done).nonzero().squeeze(-1)
        else:
            self._pending_keep = None
        return False

    def _extend(self, tokens: torch.Tensor) -> None:
        """Make the sampled tokens the next input, and drop finished rows if many have finished."""
        self.input_ids = tokens[:, None]
        self.mask = torch.cat([self.mask, self.mask.new_ones(len(tokens), 1)], dim=-1)
        self.positions = self.positions[:, -1:] + 1
        keep = self._pending_keep
        if keep is not None:
            self.cache.batch_select_indices(keep)
            self.input_ids, self.mask = self.input_ids[keep], self.mask[keep]
            self.positions, self.done = self.positions[keep], self.done[keep]
            self.rows = [self.rows[i] for i in keep.tolist()]


def sample(logits: torch.Tensor, sampling: Sampling, generator: torch.Generator) -> torch.Tensor:
    """Draw a token per row: (B, V) to (B,). Temperature 0 is greedy; then top-k, then nucleus (top-p)."""
    if sampling.temperature == 0:
        return logits.argmax(-1)
    logits = logits / sampling.temperature
    if 0 < sampling.top_k < logits.shape[-1]:
        floor = logits.topk(sampling.top_k).values[:, -1:]
        logits = logits.masked_fill(logits < floor, float("-inf"))
    if sampling.top_p < 1:
        logits = _nucleus(logits, sampling.top_p)
    return torch.multinomial(logits.softmax(-1), 1, generator=generator).squeeze(-1)


def _nucleus(logits: torch.Tensor, top_p: float) -> torch.Tensor:
    """Keep the smallest set of likeliest tokens whose probability reaches ``top_p`` (at least one token)."""
    ordered, index = logits.sort(descending=True)
    probabilities = ordered.softmax(-1)
    outside = probabilities.cumsum(-1) - probabilities >= top_p
    return logits.masked_fill(outside.scatter(-1, index, outside), float("-inf"))

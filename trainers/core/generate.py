"""The rollout engine: batched sampling with a key-value cache, shared by ppo, rollout, distill and evaluate.

Own code, because a response must be a function of explicit random numbers (transformers' ``generate`` draws from the
global generator, so a resumed run would go another way), and because latency needs the time of every token.

Token t of response i is chosen by one uniform number u[i, t] through the inverse of the cumulative distribution. So a
response does not depend on which other responses are in its batch, or on how many processes share the work (but for
rounding in the logits).

Names: N responses in all, B side by side, T tokens so far, V vocabulary.
"""

import inspect
import time
from collections.abc import Sequence as List
from dataclasses import dataclass, field
from typing import Any

import torch

from trainers.contract import BadInput, Diverged
from trainers.core.attention import with_a_cache
from trainers.core.compiling import uncompiled
from trainers.core.sharding import computes_on
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
    generator: torch.Generator | None = None,
    pad_id: int = 0,
    keep_times: bool = False,
    uniforms: torch.Tensor | None = None,
    num_known: int | None = None,
) -> list[Response]:
    """Respond to prompts (token ids, none empty). Answers come in the order of the prompts.

    What is random comes from ``uniforms``, (N, max_new_tokens) in [0, 1), or is drawn from ``generator`` on whatever
    device that lives; greedy sampling (temperature 0) needs neither. Prompts of like length go together, so little is
    padded. The model is put in eval mode meanwhile, in which gradient checkpointing does not switch the cache off.
    Only ids below ``num_known`` are chosen. Raises Diverged when logits are not finite.
    """
    if uniforms is None:
        uniforms = _draw(generator, len(prompts), sampling)
    was_training = model.training
    model.eval()
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    responses: dict[int, Response] = {}
    with with_a_cache(model), uncompiled():
        for start in range(0, len(order), sampling.batch_size):
            chosen = order[start : start + sampling.batch_size]
            batch = _Batch(
                model, [prompts[i] for i in chosen], sampling, stop_ids, uniforms[chosen], pad_id, keep_times, num_known
            )
            responses |= zip(chosen, batch.run(), strict=True)
    model.train(was_training)
    return [responses[i] for i in range(len(prompts))]


def _draw(generator: torch.Generator | None, count: int, sampling: Sampling) -> torch.Tensor:
    if sampling.temperature == 0:
        return torch.zeros(count, sampling.max_new_tokens)
    assert generator is not None, "sampling needs a generator or its uniforms"
    shape = (count, sampling.max_new_tokens)
    return torch.rand(shape, generator=generator, device=generator.device, dtype=torch.float64)


class _Batch:
    """One batch on its way. Rows that ended leave it as soon as they are half of it, so the tail gets cheaper."""

    def __init__(
        self,
        model: Any,
        prompts: List[list[int]],
        sampling: Sampling,
        stop_ids: frozenset[int],
        uniforms: torch.Tensor,
        pad_id: int,
        keep_times: bool,
        num_known: int | None,
    ) -> None:
        self.model, self.sampling, self.stop_ids = model, sampling, stop_ids
        self.keep_times, self.num_known = keep_times, num_known
        device = computes_on(model)
        self.uniforms = uniforms.to(device)
        self.responses = [Response([], False) for _ in prompts]
        self.rows = list(range(len(prompts)))
        """Which response each row of the tensors belongs to."""
        width = max(map(len, prompts))
        padded = [[pad_id] * (width - len(p)) + list(p) for p in prompts]
        self.input_ids = torch.tensor(padded, device=device)
        real = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)
        self.positions = (real.cumsum(-1) - 1).clamp(min=0)
        # Without padding no mask is needed, and building one is a good part of a small model's time per token.
        self.mask = real if min(map(len, prompts)) < width else None
        self.cache: Any = None
        # State-space models without attention name it otherwise.
        names = inspect.signature(model.forward).parameters
        self.cache_name = "cache_params" if "cache_params" in names else "past_key_values"
        # With them transformers computes a loss of experts' balance, which fails once there is a cache and a mask.
        recorded = getattr(model.config, "output_router_logits", False)
        self.no_router_logits = {"output_router_logits": False} if recorded else {}

    def run(self) -> list[Response]:
        began = time.perf_counter()
        finite = torch.tensor(True, device=self.input_ids.device)
        for t in range(self.sampling.max_new_tokens):
            logits = self._next_logits()
            finite &= logits.amax(-1).isfinite().all()
            tokens = sample(logits, self.sampling, self.uniforms[:, t])
            self._store(tokens.tolist(), time.perf_counter() - began)
            going = [i for i, row in enumerate(self.rows) if not self.responses[row].ended]
            if not going:
                break
            self._extend(tokens)
            if 2 * len(going) <= len(self.rows):
                self._keep(going)
        # Looked at once for the batch: on a GPU every look waits for the device.
        if not finite:
            raise Diverged(
                "the logits that responses are sampled from are not finite: a weight is no number, or too large"
            )
        return self.responses

    def _next_logits(self) -> torch.Tensor:
        out = self.model(
            input_ids=self.input_ids,
            attention_mask=self.mask,
            position_ids=self.positions,
            use_cache=True,
            logits_to_keep=1,
            **{self.cache_name: self.cache},
            **self.no_router_logits,
        )
        self.cache = getattr(out, self.cache_name, None)
        if self.cache is None:
            kind = self.model.config.model_type
            raise BadInput(f"models of type {kind} cannot generate: their forward pass gives no cache to go on from")
        return out.logits[:, -1, : self.num_known].float()

    def _store(self, tokens: list[int], now: float) -> None:
        """Add a token to every response that still goes on."""
        for row, token in zip(self.rows, tokens, strict=True):
            response = self.responses[row]
            if response.ended:
                continue
            response.ids.append(token)
            response.ended = token in self.stop_ids
            if self.keep_times:
                response.times.append(now)

    def _extend(self, tokens: torch.Tensor) -> None:
        """Make the sampled tokens the next input."""
        self.input_ids = tokens[:, None]
        self.positions = self.positions[:, -1:] + 1
        if self.mask is not None:
            self.mask = torch.cat([self.mask, self.mask.new_ones(len(tokens), 1)], dim=-1)

    def _keep(self, going: list[int]) -> None:
        """Drop the other rows."""
        kept = torch.tensor(going, device=self.input_ids.device)
        self.cache.reorder_cache(kept)  # every kind of layer has it, states of linear attention too
        self.input_ids, self.positions = self.input_ids[kept], self.positions[kept]
        self.uniforms = self.uniforms[kept]
        if self.mask is not None:
            self.mask = self.mask[kept]
        self.rows = [self.rows[i] for i in going]


def sample(logits: torch.Tensor, sampling: Sampling, uniforms: torch.Tensor) -> torch.Tensor:
    """Choose a token per row: logits (B, V) and uniforms (B,) in [0, 1) to ids (B,). Temperature 0 is greedy."""
    if sampling.temperature == 0:
        return logits.argmax(-1)
    probabilities = warped(logits, sampling).softmax(-1)
    # Doubles: in single precision the tail of a large vocabulary is lost in the running sum.
    cumulative = probabilities.double().cumsum(-1)
    wanted = uniforms[:, None].double() * cumulative[:, -1:]
    # The first token whose running sum exceeds what is wanted, so one of probability 0 is never chosen.
    return torch.searchsorted(cumulative, wanted, right=True).squeeze(-1).clamp(max=logits.shape[-1] - 1)


def warped(logits: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """Logits after temperature, then top-k, then nucleus (top-p), as transformers orders them: (B, V)."""
    logits = logits / sampling.temperature
    if 0 < sampling.top_k < logits.shape[-1]:
        floor = logits.topk(sampling.top_k).values[:, -1:]
        logits = logits.masked_fill(logits < floor, float("-inf"))
    if sampling.top_p < 1:
        logits = _nucleus(logits, sampling.top_p)
    return logits


def _nucleus(logits: torch.Tensor, top_p: float) -> torch.Tensor:
    """Keep the smallest set of likeliest tokens whose probability reaches ``top_p`` (at least one token)."""
    ordered, index = logits.sort(descending=True)
    probabilities = ordered.softmax(-1)
    outside = probabilities.cumsum(-1) - probabilities >= top_p
    return logits.masked_fill(outside.scatter(-1, index, outside), float("-inf"))

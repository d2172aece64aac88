"""Forward passes: scores of the chosen positions, never the logits of a whole batch.

The backbone computes in whatever precision is asked for; from its last hidden state on everything is fp32. A bf16
score has eight bits: of 300 sequences 258 got distinct ones.

Names: K scored positions, V vocabulary, H hidden width, S sequences.
"""

from collections.abc import Sequence as List
from contextlib import nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn
from torch.autograd.function import once_differentiable

from trainers.contract import BadInput
from trainers.core import attention, balance
from trainers.core.batch import Batch, Packing, Sequence, collate
from trainers.core.compiling import uncompiled
from trainers.core.head_losses import Beside, LogitsFn, LossFn, head_loss, head_values
from trainers.core.heads import head_logits
from trainers.core.layers import as_forward, backbone
from trainers.core.parallel import Workers
from trainers.core.step import in_eval_mode

if TYPE_CHECKING:
    from trainers.core.models import LoadedModel


class Scorer(nn.Module):
    """A causal language model that hands logits to a function, in chunks of scored positions."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(
        self,
        batch: Batch,
        fn: LogitsFn,
        loss: LossFn | None = None,
        sizes: List[int] | None = None,
        beside: Beside | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """``fn`` of the logits at the batch's K scored positions: (K, ...), without gradients.

        With a loss that comes first, (), and has the gradients; see :func:`trainers.core.head_losses.head_loss`.
        """
        hidden = hidden_states(self.model, batch)[batch.scored_at]
        if loss is None:
            return head_values(self.model, hidden, fn, sizes, beside)
        return head_loss(self.model, hidden, fn, loss, sizes, beside)


def hidden_states(model: Any, batch: Batch) -> torch.Tensor:
    """Final hidden states, one row per position: (R * L, H)."""
    return as_forward(model, partial(_hidden_states, model), batch).flatten(0, 1)


def _hidden_states(model: Any, batch: Batch) -> torch.Tensor:
    extra: dict[str, Any] = {} if batch.position_ids is None else {"position_ids": batch.position_ids}
    wants_balance = balance.is_wanted(model)
    if hasattr(model.config, "output_router_logits"):
        extra["output_router_logits"] = wants_balance
    # With a cache transformers does not look for packed sequences, and they would see each other.
    out = backbone(model)(input_ids=batch.input_ids, use_cache=False, **extra, **attention.bounds_of(model, batch))
    if wants_balance:
        balance.collect(model, out.router_logits, batch)
    hidden: torch.Tensor = out.last_hidden_state
    return hidden


def target_logprobs(batch: Batch, temperature: float = 1.0) -> LogitsFn:
    """Log-probability of each scored token: (k,)."""

    def fn(logits: torch.Tensor, where: slice) -> torch.Tensor:
        found: torch.Tensor = _Logprobs.apply(logits, batch.target_ids[where], temperature)
        return found

    return fn


class _Logprobs(torch.autograd.Function):
    """The gradient is written down instead of recorded, (one-hot - q) / temperature: half of the passes over logits."""

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, targets: torch.Tensor, temperature: float) -> torch.Tensor:
        log_q = (logits if temperature == 1 else logits / temperature).log_softmax(-1)
        ctx.save_for_backward(log_q, targets)
        ctx.temperature = temperature
        return log_q.gather(-1, targets.unsqueeze(-1)).squeeze(-1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        log_q, targets = ctx.saved_tensors
        wanted = (grads[0] / ctx.temperature).unsqueeze(-1)
        slope = log_q.exp_().mul_(-wanted).scatter_add_(-1, targets.unsqueeze(-1), wanted)
        return slope, None, None


def check_scoring(loaded: "LoadedModel", workers: Workers) -> None:
    """Compare our path with the model's own forward on sequences alone, and find out whether they can share rows.

    Sets the model's attention, and ``loaded.packs``. Architectures that do not read where a sequence begins from
    position_ids (convolutions, linear attention, some attention masks) are used with padded rows instead. Raises
    BadInput when padded rows differ as well: the model sees what comes after a token, or its head does more than
    :func:`head_logits`; or when the model cannot have the attention that is asked for.
    """
    model, device = loaded.model, workers.device
    kind = model.config.model_type
    if model.get_output_embeddings() is None:
        raise BadInput(f"models of type {kind} cannot be used: no language head is known of them")
    sequences = probe_sequences(model)
    as_trained = workers.autocast() if gathers_halves(model, workers) else nullcontext()
    with torch.no_grad(), in_eval_mode(model), as_trained:
        with uncompiled():
            own = [model(input_ids=torch.from_numpy(s.ids[None]).to(device)).logits[0, :-1].float() for s in sequences]

        def differs(packing: Packing) -> bool:
            batch = collate(sequences, packing, device)
            with workers.autocast() if attention.in_halves(model) else nullcontext():
                ours = head_logits(model, hidden_states(model, batch)[batch.scored_at])
            return error_share(ours.split([len(o) for o in own]), own) > tolerance(model)

        loaded.packs = attention.settle(model, workers, differs)
        if differs(Packing.PADDED):
            raise BadInput(
                f"models of type {kind} cannot be used: padded sequences or logits differ from the model's own"
            )
    if not loaded.packs and workers.is_main:
        print(f"packing is off: models of type {kind} cannot keep sequences in one row apart, so rows are padded")


def probe_sequences(model: Any) -> list[Sequence]:
    """Short sequences of any tokens but padding. Two thirds of the shorter ones share their row with what is before."""
    vocabulary = model.get_input_embeddings().weight.shape[0]
    padding = model.config.pad_token_id
    ids = np.setdiff1d(np.arange(min(vocabulary, 4096)), [] if padding is None else [padding])
    rows = [ids[(7 * np.arange(n) + n) % len(ids)].astype(np.int64) for n in (15, 5, 4, 6)]
    return [Sequence(row, np.ones(len(row), dtype=bool)) for row in rows]


def error_share(ours: List[torch.Tensor], own: List[torch.Tensor]) -> float:
    """How far the worst sequence is off, as a share of the largest value; (T, V) per sequence.

    A sequence's error is the median over its positions. What is looked for is wrong nearly everywhere, while rounding
    can send single tokens of a mixture of experts to another expert.
    """
    scale = max(float(o.abs().max()) for o in own)
    medians = [(a - b).abs().amax(-1).median() for a, b in zip(ours, own, strict=True)]
    return max(map(float, medians)) / max(scale, 1e-30)


def gathers_halves(model: Any, workers: Workers) -> bool:
    """Whether layers compute with bf16 weights, though they are held in fp32: a split model's are gathered so.

    What comes in is fp32 nevertheless, as embeddings are: such layers work under autocast alone.
    """
    sharding = workers.trained_sharding if model.training else workers.frozen_sharding
    return sharding is not None and sharding.gather_dtype == torch.bfloat16


def tolerance(model: Any) -> float:
    """What rounding explains, as a share of the largest value."""
    under_autocast = any(map(torch.is_autocast_enabled, ("cpu", "cuda")))
    halves = under_autocast or attention.in_halves(model) or next(model.parameters()).dtype != torch.float32
    return 5e-2 if halves else 1e-3

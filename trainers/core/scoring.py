"""Forward passes: scores of the chosen positions, never the logits of a whole batch.

The backbone computes in whatever precision is asked for; from its last hidden state on everything is fp32. A bf16
score has eight bits: of 300 sequences 258 got distinct ones.

Names: K scored positions, V vocabulary, H hidden width, S sequences.
"""

from collections.abc import Callable
from collections.abc import Sequence as List
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from trainers.contract import BadInput
from trainers.core import balance
from trainers.core.batch import Batch, Sequence, collate
from trainers.core.layers import as_forward, backbone
from trainers.core.parallel import Workers
from trainers.core.step import in_eval_mode

if TYPE_CHECKING:
    from trainers.core.models import LoadedModel

CHUNK_ELEMENTS = 2**26
"""Logits held at once: 256 MiB in fp32."""

LogitsFn = Callable[[torch.Tensor, slice], torch.Tensor]
"""Takes the logits of some scored positions, (k, V) in fp32, and which ones these are; returns (k, ...)."""


class Scorer(nn.Module):
    """A causal language model that hands logits to a function, in chunks of scored positions."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: Batch, fn: LogitsFn) -> torch.Tensor:
        """Apply ``fn`` to the logits at the batch's K scored positions: (K, ...)."""
        hidden = hidden_states(self.model, batch)[batch.scored_at]
        return over_chunks(self.model, hidden, fn)


def hidden_states(model: Any, batch: Batch) -> torch.Tensor:
    """Final hidden states, one row per position: (R * L, H)."""
    return as_forward(model, partial(_hidden_states, model), batch).flatten(0, 1)


def _hidden_states(model: Any, batch: Batch) -> torch.Tensor:
    extra: dict[str, Any] = {} if batch.position_ids is None else {"position_ids": batch.position_ids}
    wants_balance = balance.is_wanted(model)
    if hasattr(model.config, "output_router_logits"):
        extra["output_router_logits"] = wants_balance
    # With a cache transformers does not look for packed sequences, and they would see each other.
    out = backbone(model)(input_ids=batch.input_ids, use_cache=False, **extra)
    if wants_balance:
        balance.collect(model, out.router_logits, batch)
    hidden: torch.Tensor = out.last_hidden_state
    return hidden


def in_fp32(module: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    """A module as a function that computes in fp32, whatever its weights' type and autocast are.

    Weights of another type are converted here, once for all calls, so gradients of several chunks add up in fp32.
    """
    by_itself = _ByItself(module)
    weights = {name: weight.float() for name, weight in by_itself.named_parameters()}

    def run(hidden: torch.Tensor) -> torch.Tensor:
        with torch.autocast(hidden.device.type, enabled=False):
            found: torch.Tensor = functional_call(by_itself, weights, (hidden.float(),))
            return found

    return run


class _ByItself(nn.Module):
    """A module's forward pass without what hangs on its being called, for use inside :func:`as_forward`."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = type(self.module).forward(self.module, hidden)
        return found


def called_in_fp32(module: Any, hidden: torch.Tensor) -> torch.Tensor:
    """What a module makes of (K, H) hidden states in fp32; see :func:`in_fp32`."""
    return as_forward(module, lambda some: in_fp32(module)(some), hidden)  # noqa: PLW0108 - weights are there inside


def head_logits(model: Any, hidden: torch.Tensor) -> torch.Tensor:
    """(k, H) to (k, V) in fp32, with the scale and soft cap that some architectures put on their logits."""
    return scaled(model, called_in_fp32(model.get_output_embeddings(), hidden))


def scaled(model: Any, logits: torch.Tensor) -> torch.Tensor:
    """What a model makes of its head's product: the scale and soft cap that some architectures have."""
    config = model.config.get_text_config()
    if scale := getattr(config, "logit_scale", None):  # Cohere
        logits = logits * scale
    if scaling := getattr(config, "logits_scaling", None):  # Granite
        logits = logits / scaling
    if multiplier := getattr(config, "lm_head_multiplier", None):  # Falcon-H1
        logits = logits * multiplier
    if cap := getattr(config, "final_logit_softcapping", None):  # Gemma 2
        logits = cap * torch.tanh(logits / cap)
    return logits


def over_chunks(model: Any, hidden: torch.Tensor, fn: LogitsFn) -> torch.Tensor:
    """Run head and ``fn`` over chunks; when there is more than one, logits are recomputed in the backward pass."""
    return as_forward(model.get_output_embeddings(), partial(_over_chunks, model, fn=fn), hidden)


def _over_chunks(model: Any, hidden: torch.Tensor, fn: LogitsFn) -> torch.Tensor:
    head = in_fp32(model.get_output_embeddings())
    size = max(1, CHUNK_ELEMENTS // model.get_output_embeddings().weight.shape[0])
    if len(hidden) <= size:
        return fn(scaled(model, head(hidden)), slice(0, len(hidden)))
    parts = []
    for start in range(0, len(hidden), size):
        where = slice(start, min(start + size, len(hidden)))

        def run(part: torch.Tensor, where: slice = where) -> torch.Tensor:
            return fn(scaled(model, head(part)), where)

        parts.append(checkpoint(run, hidden[where], use_reentrant=False))
    return torch.cat(parts)


def target_logprobs(batch: Batch, temperature: float = 1.0) -> LogitsFn:
    """Log-probability of each scored token: (k,)."""

    def fn(logits: torch.Tensor, where: slice) -> torch.Tensor:
        if temperature != 1.0:
            logits = logits / temperature
        chosen = logits.gather(-1, batch.target_ids[where, None]).squeeze(-1)
        return chosen - logits.logsumexp(-1)

    return fn


def check_scoring(loaded: "LoadedModel", workers: Workers) -> None:
    """Compare our path with the model's own forward on sequences alone, and find out whether they can share rows.

    Sets ``loaded.packs``. Architectures that do not read where a sequence begins from position_ids (convolutions, linear
    attention, some attention masks) are used with padded rows instead. Raises BadInput when padded rows differ as well:
    the model sees what comes after a token, or its head does more than :func:`head_logits`.
    """
    model, device = loaded.model, workers.device
    kind = model.config.model_type
    if model.get_output_embeddings() is None:
        raise BadInput(f"models of type {kind} cannot be used: no language head is known of them")
    sequences = probe_sequences(model)
    with torch.no_grad(), in_eval_mode(model):
        own = [model(input_ids=torch.from_numpy(s.ids[None]).to(device)).logits[0, :-1].float() for s in sequences]

        def differs(packing: bool) -> bool:
            batch = collate(sequences, packing, device)
            ours = head_logits(model, hidden_states(model, batch)[batch.scored_at])
            return error_share(ours.split([len(o) for o in own]), own) > tolerance(model)

        if differs(packing=False):
            raise BadInput(
                f"models of type {kind} cannot be used: padded sequences or logits differ from the model's own"
            )
        loaded.packs = not differs(packing=True)
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


def tolerance(model: Any) -> float:
    """What rounding explains, as a share of the largest value."""
    return 1e-3 if next(model.parameters()).dtype == torch.float32 else 5e-2

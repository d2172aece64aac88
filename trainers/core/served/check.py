"""Whether a server has the very model that a phase means: its vocabulary, and the probabilities of its weights."""

import statistics
from collections.abc import Sequence as List
from typing import Any

import numpy as np
import torch

from trainers.contract import BadInput
from trainers.core.batch import Batch, Sequence
from trainers.core.chat import ChatFormat
from trainers.core.models import LoadedModel
from trainers.core.parallel import Workers
from trainers.core.scoring import Scorer, target_logprobs
from trainers.core.served.tokens import other_tokens, vocabulary_texts
from trainers.core.served.wire import Wire
from trainers.core.sharding import whole_shape
from trainers.core.step import Layout, scored
from trainers.core.vocabulary import PROBES

LARGEST_DIFFERENCE = 0.1
"""Nats that a token's log-probability may differ by in the median. bf16 beside fp32 makes 0.04 of rounding."""

NEW_TOKENS = 32
"""Of the answers that the server is asked for."""


def check_vocabulary(wire: Wire, ids: int) -> None:
    """Raise BadInput unless the server takes the ids below this, and no other."""
    for token, wanted in ((ids - 1, True), (ids, False)):
        if wire.takes(token) is not wanted:
            raise BadInput(
                f"{wire.server.field}: {wire.server.url} serves another model as {wire.name!r}: it "
                f"{'lacks' if wanted else 'has'} a token of the number {token}, and the phase's own has {ids} tokens"
            )


def check_texts(wire: Wire, tokenizer: Any) -> None:
    """Raise BadInput if the server reads words of the vocabulary as other tokens; for weights that are not compared."""
    difference = other_tokens(wire, tokenizer, vocabulary_texts(tokenizer))
    if difference is not None:
        raise BadInput(f"{wire.server.field}: {wire.server.url} serves another model as {wire.name!r}: {difference}")


def check_weights(wire: Wire, loaded: LoadedModel, workers: Workers) -> None:
    """Raise BadInput if the server gives tokens other probabilities than the model's weights do."""
    rows = _rows(wire, loaded.chat, int(whole_shape(loaded.model.get_output_embeddings().weight)[0]))
    theirs = [wire.logprobs(row) for row in rows]
    ours = own_logprobs(workers, loaded, rows)
    pairs = [pair for row in zip(ours, theirs, strict=True) for pair in zip(*row, strict=True)]
    off = statistics.median(abs(a - b) for a, b in pairs)
    if not off <= LARGEST_DIFFERENCE:
        raise BadInput(
            f"{wire.server.field}: {wire.server.url} serves another model as {wire.name!r}: log-probabilities of its answers "
            f"differ by {off:.2g} nats from the phase's own model's, and rounding explains {LARGEST_DIFFERENCE}"
        )


def own_logprobs(workers: Workers, loaded: LoadedModel, rows: List[list[int]]) -> list[list[float]]:
    """Of every token but each row's first, the same on all ranks."""
    scorer, items = Scorer(loaded.model), [_all_scored(row) for row in rows]
    layout = Layout[Sequence](lambda item: [item], max(map(len, rows)), packing=False)

    def score(some: list[Sequence], batch: Batch) -> list[list[float]]:
        found = scorer(batch, target_logprobs(batch))
        assert isinstance(found, torch.Tensor)
        return [part.tolist() for part in found.float().split(batch.counts().tolist())][: len(some)]

    return scored(workers, layout, items, score)


def _rows(wire: Wire, chat: ChatFormat, vocabulary: int) -> list[list[int]]:
    """Conversations that the template takes, with the server's likeliest answers to them."""
    found = []
    for messages in PROBES:
        try:
            prompt = chat.prompt(messages)
        except BadInput:  # a template without a system's turn, say
            continue
        new = min(NEW_TOKENS, wire.positions - len(prompt) - 1)
        found.append(prompt + wire.continued(prompt, new, vocabulary) if new > 0 else prompt[: wire.positions - 1])
    return found


def _all_scored(row: list[int]) -> Sequence:
    return Sequence(np.array(row, dtype=np.int64), np.ones(len(row), dtype=bool))

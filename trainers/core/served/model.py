"""A model that only a server holds: its tokenizer, template and end tokens are read here, its weights are not."""

from collections.abc import Mapping
from collections.abc import Sequence as List
from dataclasses import dataclass
from typing import Any

import numpy as np
from transformers import GenerationConfig

from trainers.contract import Diverged
from trainers.core.chat import ChatFormat, format_of
from trainers.core.chat_settings import apply_chat_settings
from trainers.core.context import PhaseContext
from trainers.core.generate import Response
from trainers.core.models import LoadedModel, positions
from trainers.core.served.check import check_vocabulary, check_weights
from trainers.core.served.server import Server, side_by_side
from trainers.core.served.wire import Answer, Wire, connected
from trainers.core.weights import read_config, read_tokenizer
from trainers.spec import RespondingModel, Sampling

LARGEST_SEED = 2**53
"""Whole numbers below this survive a proxy that reads them as doubles."""


@dataclass(frozen=True)
class ServedModel:
    wire: Wire
    tokenizer: Any
    chat: ChatFormat
    num_known: int
    """Responses hold ids below this alone."""
    positions: int
    """Tokens that the model was made for; the server may be set up for fewer."""
    bias: Mapping[str, float]
    """What keeps the server from ids that its matrices have rows for and the tokenizer no token."""

    def responses(self, prompts: List[list[int]], sampling: Sampling, keys: List[tuple[int, ...]]) -> list[Response]:
        """One to each prompt, of which ``keys`` are all the randomness. Raises Diverged for probabilities that are no numbers."""
        stops = sorted(self.chat.stop_ids)
        self.wire.check_length(max(map(len, prompts), default=0) + sampling.max_new_tokens)

        def ask(i: int) -> Answer:
            return self.wire.respond(prompts[i], sampling, seed_of(keys[i]), stops, self.bias)

        found = side_by_side(ask, list(range(len(prompts))), sampling.batch_size)
        if not all(np.isfinite(answer.logprobs).all() for answer in found):
            raise Diverged("the log-probabilities of the server's responses are not finite: a weight is no number")
        return [Response(a.ids, a.ids[-1] in self.chat.stop_ids, a.logprobs) for a in found]


def seed_of(key: tuple[int, ...]) -> int:
    """What a server draws a response by."""
    return int(np.random.default_rng(key).integers(LARGEST_SEED))


def served_model(ctx: PhaseContext, field: str, ref: RespondingModel, weights: LoadedModel | None) -> ServedModel:
    """The server's model. Raises BadInput if it is not the reference's: told by ``weights``, or without by the vocabulary."""
    ctx.meter.stage(f"asking {ref.url}")
    folder = ctx.model_location(ref)
    config = read_config(folder, ref.trust_remote_code)
    tokenizer = read_tokenizer(folder, ref.trust_remote_code)
    apply_chat_settings(tokenizer, ref, ctx.base_dir)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    rows = int(config.get_text_config().vocab_size)
    named = max(tokenizer.get_vocab().values()) + 1
    wire = connected(Server(field, ref, lambda: ctx.stop_signal is not None), ref.served_as)
    check_vocabulary(wire, max(rows, named))
    if weights is not None:
        check_weights(wire, weights, ctx.workers)
    ctx.meter.stage("")
    known = min(rows, named)
    return ServedModel(
        wire,
        tokenizer,
        format_of(tokenizer, _generation(folder, config), rows),
        known,
        positions(config),
        {str(token): -100 for token in range(known, rows)},
    )


def _generation(folder: str, config: Any) -> Any:
    """What names a model's end tokens, as transformers takes it."""
    try:
        return GenerationConfig.from_pretrained(folder)
    except OSError:
        return GenerationConfig.from_model_config(config)

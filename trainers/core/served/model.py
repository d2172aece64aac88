"""A model that only a server holds: its tokenizer, template and end tokens are read here, its weights are not."""

import os
from collections.abc import Iterator, Mapping
from collections.abc import Sequence as List
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from transformers import GenerationConfig

from trainers.core.chat import ChatFormat, format_of
from trainers.core.chat_settings import apply_chat_settings
from trainers.core.context import PhaseContext
from trainers.core.generate import Response
from trainers.core.models import LoadedModel, positions
from trainers.core.parallel import Workers
from trainers.core.served.check import check_vocabulary, check_weights
from trainers.core.served.server import Server, side_by_side
from trainers.core.served.started import started
from trainers.core.served.wire import Answer, Wire, connected
from trainers.core.weights import read_config, read_tokenizer
from trainers.spec import OwnServer, RespondingModel, Sampling

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
        """One to each prompt, of which ``keys`` are all the randomness."""
        stops = sorted(self.chat.stop_ids)
        self.wire.check_length(max(map(len, prompts), default=0) + sampling.max_new_tokens)

        def ask(i: int) -> Answer:
            return self.wire.respond(prompts[i], sampling, seed_of(keys[i]), stops, self.bias, self.num_known)

        found = side_by_side(ask, range(len(prompts)), sampling.batch_size, self.wire.server.look)
        return [Response(a.ids, a.ids[-1] in self.chat.stop_ids, a.logprobs) for a in found]


def seed_of(key: tuple[int, ...]) -> int:
    """What a server draws a response by."""
    return int(np.random.default_rng(key).integers(LARGEST_SEED))


def served_model(ctx: PhaseContext, field: str, ref: RespondingModel, weights: LoadedModel | None) -> ServedModel:
    """The model of the user's server. Raises BadInput if it is another one than ``weights``, or has another vocabulary."""
    ctx.meter.stage(f"asking {ref.url}")
    model = _model(ctx, ref, Server(field, ref, lambda: ctx.stop_signal is not None))
    if weights is not None:
        check_weights(model.wire, weights, ctx.workers)
    ctx.meter.stage("")
    return model


@contextmanager
def own_served_model(
    ctx: PhaseContext, field: str, ref: RespondingModel, settings: OwnServer | None, logprobs: int = 0
) -> Iterator[ServedModel]:
    """The model of a server that is started for it, from the model's own files, and ends with the block.

    ``logprobs``: how many of a token's alternatives it is to tell.
    """
    ctx.meter.stage("starting vLLM")
    flags = ["--dtype", precision(ctx.workers)]
    flags += ["--max-logprobs", str(logprobs)] if logprobs else []
    flags += ["--trust-remote-code"] if ref.trust_remote_code else []
    with started(ctx, field, settings or OwnServer(), os.path.abspath(ctx.model_location(ref)), flags) as server:
        model = _model(ctx, ref, server)
        ctx.meter.stage("")
        yield model


def precision(workers: Workers) -> str:
    """The phase's arithmetic, as vLLM calls it, which takes fp16 for files in fp32 unless told."""
    return "bfloat16" if workers.bf16 else "float32"


def _model(ctx: PhaseContext, ref: RespondingModel, server: Server) -> ServedModel:
    """The server's model under the reference's tokenizer. Raises BadInput for another vocabulary."""
    folder = ctx.model_location(ref)
    config = read_config(folder, ref.trust_remote_code)
    tokenizer = read_tokenizer(folder, ref.trust_remote_code)
    apply_chat_settings(tokenizer, ref, ctx.base_dir)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    rows = int(config.get_text_config().vocab_size)
    named = max(tokenizer.get_vocab().values()) + 1
    wire = connected(server, ref.served_as)
    check_vocabulary(wire, max(rows, named))
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

"""A model that only a server holds: its tokenizer, template and end tokens are read here, its weights are not."""

import os
from collections.abc import Iterator
from collections.abc import Sequence as List
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from transformers import GenerationConfig

from trainers.contract import BadInput
from trainers.core.chat import ChatFormat, format_of
from trainers.core.chat_settings import apply_chat_settings
from trainers.core.context import PhaseContext
from trainers.core.generate import Response
from trainers.core.models import LoadedModel, positions
from trainers.core.parallel import Workers
from trainers.core.served.check import check_texts, check_vocabulary, check_weights
from trainers.core.served.server import Server, side_by_side
from trainers.core.served.started import started
from trainers.core.served.wire import Answer, Wire, connected
from trainers.core.weights import read_config, read_tokenizer
from trainers.spec import OwnServer, RespondingModel, Sampling

LARGEST_SEED = 2**53
"""Whole numbers below this survive a proxy that reads them as doubles."""
MOST_BARRED = 1024
"""Tokens that a request may have a `logit_bias` for: with more, vLLM's newer model runner (v1/worker/gpu/sample/logit_bias.py,
0.32) raises where nothing is caught, and the server ends. No message says so before."""


@dataclass(frozen=True)
class ServedModel:
    wire: Wire
    tokenizer: Any
    chat: ChatFormat
    num_known: int
    """Responses hold ids below this alone."""
    positions: int
    """Tokens that the model was made for; the server may be set up for fewer."""
    rows: int
    """Of its matrices. Ids from ``num_known`` on are no token of the tokenizer's."""

    def responses(self, prompts: List[list[int]], sampling: Sampling, keys: List[tuple[int, ...]]) -> list[Response]:
        """One to each prompt, of which ``keys`` are all the randomness."""
        self.wire.check_length(max(map(len, prompts), default=0) + sampling.max_new_tokens)

        def ask(i: int) -> Answer:
            return self._respond(prompts[i], sampling, keys[i])

        found = side_by_side(ask, range(len(prompts)), sampling.batch_size, self.wire.server.look)
        return [Response(a.ids, a.ids[-1] in self.chat.stop_ids, a.logprobs) for a in found]

    def _respond(self, prompt: list[int], sampling: Sampling, key: tuple[int, ...]) -> Answer:
        """A response to one prompt, of ids below ``num_known``.

        The server is kept from other ids as far as it can be. Where it draws one that it was not kept from, what stands before
        stays, and the rest is drawn anew without that id: tokens have the same probabilities as if all had been barred, but for
        what topP and topK leave others where such an id is among the likeliest.
        """
        barred, said = list(range(self.num_known, self.rows))[:MOST_BARRED], Answer([], [])
        for again in range(MOST_BARRED):
            left = sampling.model_copy(update={"max_new_tokens": sampling.max_new_tokens - len(said.ids)})
            seed = seed_of((*key, again) if again else key)
            more = self._drawn([*prompt, *said.ids], left, seed, barred)
            kept = next((i for i, token in enumerate(more.ids) if token >= self.num_known), None)
            said = Answer(said.ids + more.ids[:kept], said.logprobs + more.logprobs[:kept])
            if kept is None:
                return said
            barred = [*barred[1:], more.ids[kept]]
        raise BadInput(
            f"{self.wire.server.field}: {self.wire.server.url} draws ids from {self.num_known} on again and again, which are "
            "no tokens of the tokenizer: its model has not learned to leave them"
        )

    def _drawn(self, prompt: list[int], sampling: Sampling, seed: int, barred: list[int]) -> Answer:
        bias = {str(token): -100.0 for token in barred}
        below = self.num_known if self.rows - self.num_known <= MOST_BARRED else self.rows
        return self.wire.respond(prompt, sampling, seed, sorted(self.chat.stop_ids), bias, below)


def seed_of(key: tuple[int, ...]) -> int:
    """What a server draws a response by."""
    return int(np.random.default_rng(key).integers(LARGEST_SEED))


def served_model(ctx: PhaseContext, field: str, ref: RespondingModel, weights: LoadedModel | None) -> ServedModel:
    """The model of the user's server. Raises BadInput if it is another one than ``weights``, or has another vocabulary."""
    ctx.meter.stage(f"asking {ref.url}")
    model = _model(ctx, ref, Server(field, ref, lambda: ctx.stop_signal is not None))
    if weights is None:
        check_texts(model.wire, model.tokenizer)
    else:
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
        rows,
    )


def _generation(folder: str, config: Any) -> Any:
    """What names a model's end tokens, as transformers takes it."""
    try:
        return GenerationConfig.from_pretrained(folder)
    except OSError:
        return GenerationConfig.from_model_config(config)

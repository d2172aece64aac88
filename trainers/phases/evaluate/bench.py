"""A model on the bench: its responses, their rewards, its losses and divergences, each measured at most once.

With several processes all go through the same measurements in step and share each one's rows; rank 0 keeps the cells.
Every row's result depends on the seed and the row alone, so the number of processes changes nothing.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, replace
from functools import partial
from itertools import islice
from typing import Any

import torch

from trainers.contract import BadInput, canonical_json, sha256_text
from trainers.core.batch import Batch
from trainers.core.batch import Sequence as Tokens
from trainers.core.chat import ChatFormat
from trainers.core.checked_rows import CheckedRows
from trainers.core.encode import conversation, joined, prompt_ids, prompt_messages
from trainers.core.models import LoadedModel, context_length, load_causal_lm
from trainers.core.rewards import response_rewards
from trainers.core.rollouts import Prompt, respond
from trainers.core.rows import Row
from trainers.core.scoring import Scorer, check_scoring, target_logprobs
from trainers.core.served.model import ServedModel, own_served_model, served_model
from trainers.core.step import Layout, scored
from trainers.core.vocabulary import same_ids
from trainers.phases.evaluate.divergence import divergence_sums
from trainers.phases.evaluate.laboratory import Laboratory, check_room
from trainers.phases.evaluate.settings import BenchmarkRows
from trainers.phases.evaluate.subject import Divergence, Loss, NotComparable, Reply
from trainers.smaller import of_responses, times_halved
from trainers.spec import NamedModel, Sampling

BLOCK = 512
"""Rows per cell: the most that an interruption can cost."""


class Bench:
    """One model, and what can be measured of it. ``data`` and ``sampling`` default to the evaluation's."""

    def __init__(self, laboratory: Laboratory, ref: NamedModel, baseline: "Bench | None" = None) -> None:
        self.laboratory, self.ref = laboratory, ref
        self.label = ref.label
        self.baseline = baseline
        self._loaded: LoadedModel | None = None
        self._served: ServedModel | None = None
        self._until_released = laboratory.ctx.closing.enter_context(ExitStack())

    @property
    def has_reward_model(self) -> bool:
        return self.laboratory.spec.reward_model is not None

    @property
    def loaded(self) -> LoadedModel:
        """The model, loaded when something has to be measured."""
        if self._loaded is None:
            ctx = self.laboratory.ctx
            ctx.meter.stage(f"loading {self.label}")
            self._loaded = load_causal_lm(ctx, self.ref, frozen=True)
            ctx.meter.stage("")
        return self._loaded

    def speaker(self, sampling: Sampling) -> LoadedModel | ServedModel:
        """Who responds: the model here, or the server that has it."""
        if sampling.engine == "own":
            return self.loaded
        if self._served is None:
            self._served = self._serve()
        return self._served

    def _serve(self) -> ServedModel:
        ctx, field = self.laboratory.ctx, f"models ({self.label})"
        if self.ref.url is None:
            own = own_served_model(ctx, field, self.ref, self.laboratory.spec.server)
            return self._until_released.enter_context(own)
        return served_model(ctx, field, self.ref, self.loaded if self.ref.check_weights else None)

    @property
    def digest(self) -> str:
        return self.laboratory.digest(self.ref)

    def release(self) -> None:
        """Make room for the next model."""
        self._loaded = self._served = None
        self._until_released.close()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    # -- what benchmarks ask for

    def pause(self) -> None:
        self.laboratory.ctx.stop_if_asked()

    def answered(self, data: BenchmarkRows | None, sampling: Sampling | None) -> Iterator[tuple[Row, Reply]]:
        """Every row with the model's response."""
        for block, replies, _ in self._answers(data, sampling):
            yield from zip(block, replies, strict=True)

    def rewards(self, data: BenchmarkRows | None, sampling: Sampling | None) -> Iterator[float]:
        """The reward model's scores of the responses."""
        assert self.laboratory.spec.reward_model is not None
        judge = {"kind": "rewards", "judge": self.laboratory.digest(self.laboratory.spec.reward_model)}
        return self._of_answers(data, sampling, judge, self._score)

    def divergences(self, data: BenchmarkRows | None, sampling: Sampling | None) -> Iterator[Divergence]:
        """KL to the reference on the responses. Raises NotComparable for a model with other tokens."""
        assert self.laboratory.reference_ref is not None
        reference = self.laboratory.digest(self.laboratory.reference_ref)
        if reason := self._other_tokens(reference):
            raise NotComparable(reason)
        limit = self._data(data).max_prompt_length
        length = self._sampling(sampling).max_new_tokens

        def measure(answered: list[tuple[Row, Reply]]) -> list[list[float]]:
            return self._diverge(answered, limit, length)

        found = self._of_answers(data, sampling, {"kind": "kl", "reference": reference}, measure)
        return (Divergence(kl, int(tokens)) for kl, tokens in found)

    def losses(self, data: BenchmarkRows | None) -> Iterator[Loss]:
        """Losses on the rows' own responses."""
        rows = self.rows(data, "sft")
        limit = self._data(data).max_prompt_length
        for first in range(0, len(rows), BLOCK):
            block = rows[first : first + BLOCK]
            key = {"kind": "losses", "model": self.digest, "rows": _content(block, "response"), "limit": limit}
            found = self.cell(key, partial(self._lose, rows, first, limit))
            self.laboratory.shortened(rows, first, (shortened > 0 for _, _, shortened in found))
            yield from (Loss(nll, int(tokens), int(shortened)) for nll, tokens, shortened in found)

    def rows(self, data: BenchmarkRows | None, schema: str) -> CheckedRows:
        return self.laboratory.rows(self._data(data), schema)

    # -- measurements

    def cell(self, key: dict[str, Any], measure: Callable[[], Any]) -> Any:
        """See :meth:`Laboratory.cell`."""
        return self.laboratory.cell(self.label, key, measure)

    def _answers(
        self, data: BenchmarkRows | None, sampling: Sampling | None
    ) -> Iterator[tuple[list[Row], list[Reply], dict[str, Any]]]:
        """(rows, the model's responses, key of their cell), block by block: no more of them are held."""
        rows, sampling = self.rows(data, "prompt"), self._sampling(sampling)
        limit = self._data(data).max_prompt_length
        for first in range(0, len(rows), BLOCK):
            block = rows[first : first + BLOCK]
            key = self._responses_key(block, first, sampling, limit)
            found = self.cell(key, partial(self._respond, rows, first, sampling, limit))
            replies = [Reply(**reply) for reply in found]
            self.laboratory.shortened(rows, first, (reply.shortened > 0 for reply in replies))
            yield block, replies, key

    def _of_answers(self, data: Any, sampling: Any, key: dict[str, Any], measure: Callable[..., Any]) -> Iterator[Any]:
        """What is measured of the responses, block by block, under their own key and ``key``."""
        for block, replies, of in self._answers(data, sampling):
            yield from self.cell({"of": of, **key}, partial(measure, list(zip(block, replies, strict=True))))

    def _responses_key(self, rows: list[Row], first: int, sampling: Sampling, limit: int) -> dict[str, Any]:
        return {
            "kind": "responses",
            "model": self.digest,
            "rows": _content(rows),
            "first": first,
            "limit": limit,
            # Responses do not depend on what is generated beside them.
            "sampling": sampling.document(exclude={"batch_size"}),
            **self._server_key(sampling),
            "seed": self.laboratory.ctx.seed if sampling.temperature else None,
        }

    def _server_key(self, sampling: Sampling) -> dict[str, Any]:
        """What may change the arithmetic of a server that is started here."""
        settings = self.laboratory.spec.server
        own = sampling.engine == "vllm" and self.ref.url is None and settings is not None
        return {"server": list(settings.args)} if own and settings else {}

    def _respond(self, rows: CheckedRows, first: int, sampling: Sampling, limit: int) -> list[dict[str, Any]]:
        ctx, block = self.laboratory.ctx, rows[first : first + BLOCK]
        speaker = self.speaker(sampling)  # which may have to be started or loaded first
        with ctx.meter.part("rollout"):
            room = check_room(self.label, speaker.positions, sampling.max_new_tokens)
            whole = [self._prompt(speaker.chat, row, partial(rows.place, first + i)) for i, row in enumerate(block)]
            prompts = [Prompt(row, ids[-min(limit, room) :]) for row, ids in zip(block, whole, strict=True)]
            keys = [(ctx.seed, first + i) for i in range(len(block))]
            sampling = of_responses(sampling, -(-len(block) // ctx.workers.world), times_halved())
            samples = respond(ctx.workers, speaker, prompts, sampling, keys)
            mine = samples[ctx.workers.rank :: ctx.workers.world]
            ctx.meter.count(sum(len(s.ids) for s in mine), len(mine))
        lost = [len(ids) - len(prompt.ids) for ids, prompt in zip(whole, prompts, strict=True)]
        return [asdict(Reply(s.text, s.ids, s.ended, n)) for s, n in zip(samples, lost, strict=True)]

    def _score(self, answered: list[tuple[Row, Reply]]) -> list[float]:
        laboratory = self.laboratory
        judge = laboratory.reward_model
        with laboratory.ctx.meter.part("evaluation"):
            return response_rewards(
                laboratory.ctx.workers,
                judge,
                [prompt_messages(row) for row, _ in answered],
                [reply.text for _, reply in answered],
                [reply.ended for _, reply in answered],
                context_length(judge.model),
                laboratory.spec.parallel.micro_batch_tokens,
            )

    def _diverge(self, answered: list[tuple[Row, Reply]], limit: int, new_tokens: int) -> list[list[float]]:
        limit = min(limit, check_room(self.label, self.loaded.positions, new_tokens))
        found = [
            joined(prompt_ids(self.loaded.chat, row), reply.ids, limit + len(reply.ids)) for row, reply in answered
        ]
        sequences = [sequence for sequence in found if sequence is not None]  # all: there is room for every reply
        reference = self.laboratory.reference.model
        return self._sums(sequences, lambda batch: divergence_sums(self.loaded.model, reference, batch))

    def _lose(self, rows: CheckedRows, first: int, limit: int) -> list[list[float]]:
        """(loss, scored tokens, tokens left out) of each row."""
        check_scoring(self.loaded, self.laboratory.ctx.workers)
        scorer = Scorer(self.loaded.model)
        block = rows[first : first + BLOCK]
        given = [self._given(row, limit, partial(rows.place, first + i)) for i, row in enumerate(block)]
        sequences = [sequence for found in given for sequence in found]
        sums = iter(self._sums(sequences, lambda batch: batch.sums(-scorer(batch, target_logprobs(batch)))))
        return [
            [*map(sum, zip(*islice(sums, len(found)), strict=True)), sum(s.shortened for s in found)] for found in given
        ]

    def _sums(self, sequences: list[Tokens], measure: Callable[[Batch], torch.Tensor]) -> list[list[float]]:
        """(sum, scored tokens) of each sequence, in forward passes without packing: any architecture can do that."""
        ctx = self.laboratory.ctx
        layout = Layout[Tokens](lambda sequence: [sequence], ctx.spec.parallel.micro_batch_tokens, packing=False)

        def score(some: list[Tokens], batch: Batch) -> list[list[float]]:
            sums = measure(batch).float().tolist()
            return [[total, sequence.num_scored] for sequence, total in zip(some, sums, strict=False)]

        with ctx.meter.part("evaluation"):
            return scored(ctx.workers, layout, sequences, score)

    # -- tokens

    def _prompt(self, chat: ChatFormat, row: Row, place: Callable[[], str]) -> list[int]:
        """The prompt's tokens. Raises BadInput for what the template refuses."""
        with self._at(place):
            return prompt_ids(chat, row)

    @contextmanager
    def _at(self, place: Callable[[], str]) -> Iterator[None]:
        """Errors say where a row stands, and for which model."""
        try:
            yield
        except BadInput as problem:
            raise BadInput(f"{place()}: {problem} (model {self.label!r})") from problem

    def _given(self, row: Row, limit: int, place: Callable[[], str]) -> list[Tokens]:
        """A row's prompts and responses. A response that does not fit the model is cut, so no model skips a row."""
        chat, longest = self.loaded.chat, context_length(self.loaded.model)
        with self._at(place):
            whole = chat.turns(prompt_messages(row)) if "messages" in row else [self._answer(row)]
        turns = [(prompt, response[: longest - 1]) for prompt, response in whole]
        if "messages" not in row:
            longest = min(longest, limit + len(turns[0][1]))
        sequences = conversation(turns, longest)
        if not sequences:
            raise BadInput(f"{place()}: it has no response to score (model {self.label!r})")
        cut = sum(len(response) - len(kept) for (_, response), (_, kept) in zip(whole, turns, strict=True))
        return [replace(sequences[0], shortened=sequences[0].shortened + cut), *sequences[1:]]

    def _answer(self, row: Row) -> tuple[list[int], list[int]]:
        return self.loaded.chat.taught(prompt_messages(row), row["response"])

    def _other_tokens(self, reference: str) -> str | None:
        key = {"kind": "tokens", "model": self.digest, "reference": reference}
        found = self.cell(key, lambda: {"differ": self._compare_tokens()})
        return found["differ"]

    def _compare_tokens(self) -> str | None:
        reference = self.laboratory.reference
        reason = same_ids(self.loaded.tokenizer, reference.tokenizer)
        if reason is None and (self.loaded.num_known or 0) > (reference.num_known or 0):
            reason = f"it knows {self.loaded.num_known}, the reference {reference.num_known}"
        return None if reason is None else f"its tokens are not the reference's: {reason}"

    def _data(self, data: BenchmarkRows | None) -> BenchmarkRows:
        chosen = data or self.laboratory.spec.data
        assert chosen is not None
        return chosen

    def _sampling(self, sampling: Sampling | None) -> Sampling:
        return sampling or self.laboratory.spec.sampling


def _content(rows: list[Row], *keys: str) -> str:
    """Digest of what a model reads of rows, so that a changed answer key makes no model answer again."""
    return sha256_text(
        canonical_json([{k: row.get(k) for k in ("messages", "prompt", "tools", *keys)} for row in rows])
    )

"""A model on the bench: its responses, their rewards, its losses and divergences, each measured at most once.

With several processes all go through the same measurements in step and share each one's rows; rank 0 keeps the cells.
Every row's result depends on the seed and the row alone, so the number of processes changes nothing.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch

from trainers.contract import BadInput, DataRecord, canonical_json, sha256_text
from trainers.core.batch import Sequence as Tokens
from trainers.core.batch import collate, plan_micro_batches
from trainers.core.context import PhaseContext
from trainers.core.encode import joined, prompt_ids, prompt_messages, sft_sequence
from trainers.core.models import LoadedModel, context_length, load_causal_lm
from trainers.core.reward_models import load_reward_model
from trainers.core.rewards import response_rewards
from trainers.core.rollouts import Prompt, respond
from trainers.core.rows import Row, read_rows
from trainers.core.scoring import Scorer, check_scoring, target_logprobs
from trainers.core.vocabulary import same_tokens
from trainers.files import tree_digest
from trainers.phases.evaluate.benchmark import BenchmarkRows, NotComparable
from trainers.phases.evaluate.cells import Cells
from trainers.phases.evaluate.divergence import divergence_sums
from trainers.phases.evaluate.spec import EvaluateSpec
from trainers.spec import ModelRef, NamedModel, RewardModelRef, Sampling, find_models

BLOCK = 512
"""Rows per cell: the most that an interruption can cost."""


@dataclass(frozen=True)
class Reply:
    text: str
    ids: list[int]
    """Generated tokens, the end token included."""
    ended: bool
    """Whether it stopped by itself rather than at the length limit."""

    @property
    def length(self) -> int:
        return len(self.ids)


@dataclass(frozen=True)
class Loss:
    nll: float
    """Negative log-likelihood of the row's scored tokens, in nats."""
    tokens: int


@dataclass(frozen=True)
class Divergence:
    kl: float
    """KL(model || reference), summed over the response's tokens, in nats."""
    tokens: int


class Laboratory:
    """What all models of an evaluation share: rows, cells, the reward model and the reference."""

    def __init__(self, ctx: PhaseContext, spec: EvaluateSpec, reference: ModelRef | None) -> None:
        self.ctx, self.spec = ctx, spec
        self.cells = Cells(ctx.dir.root, ctx.fetch_cell, ctx.keep)
        self.reference_ref = reference
        self.records: dict[str, DataRecord] = {}
        self._rows: dict[tuple[str, str], list[Row]] = {}
        self._reward_model: LoadedModel | None = None
        self._reference: LoadedModel | None = None
        self._digests: dict[str, str] = {}

    def rows(self, data: BenchmarkRows, schema: str) -> list[Row]:
        where = f"{next(path for path, other in find_models(self.spec, BenchmarkRows) if other is data)}.rows"
        if (where, schema) not in self._rows:
            found = read_rows(data.rows, schema, self.ctx.base_dir, data.on_malformed, where)
            self._rows[where, schema] = found.rows
            self.records |= {record.source: record for record in found.records}
        return self._rows[where, schema]

    @property
    def reward_model(self) -> LoadedModel:
        if self._reward_model is None:
            assert self.spec.reward_model is not None
            self._reward_model = load_reward_model(self.ctx, self.spec.reward_model)
        return self._reward_model

    @property
    def reference(self) -> LoadedModel:
        if self._reference is None:
            assert self.reference_ref is not None
            self._reference = load_causal_lm(self.ctx, self.reference_ref, frozen=True)
        return self._reference

    def digest(self, ref: ModelRef | RewardModelRef) -> str:
        """Identity of a model: its phase's artifact, a folder's content, or what is asked for on a hub."""
        name = canonical_json(ref.document(exclude={"name"}))
        if name not in self._digests:
            self._digests[name] = self._digest(ref, name)
        return self._digests[name]

    def _digest(self, ref: ModelRef | RewardModelRef, name: str) -> str:
        if ref.phase is not None:
            return self.ctx.file.inputs[ref.phase].digest
        folder = self.ctx.base_dir / ref.source if ref.source is not None else None
        if folder is not None and folder.is_dir():
            return tree_digest(folder)
        return sha256_text(f"{name} {self.ctx.seed}")

    def cell(self, key: dict[str, Any], measure: Callable[[], Any]) -> Any:
        """A measurement from its cell, or made now. All processes get the same."""
        key = {**key, "image": self.ctx.file.image, "precision": "bf16" if self.ctx.workers.bf16 else "fp32"}
        main = self.ctx.workers.is_main
        value = self.ctx.workers.gather_objects([self.cells.get(key)] if main else [])[0]
        if value is None:
            self.ctx.stop_if_asked()
            value = measure()
            if main:
                self.cells.put(key, value)
        return value

    def spread(self, count: int, measure: Callable[[Sequence[int]], list[Any]]) -> list[Any]:
        """Results by index; every process measures its share of the indices."""
        workers = self.ctx.workers
        mine = range(count)[workers.rank :: workers.world]
        pairs: list[object] = list(zip(mine, measure(mine), strict=True))
        gathered: dict[int, Any] = dict(workers.gather_objects(pairs))  # type: ignore[arg-type]
        return [gathered[i] for i in range(count)]


class Bench:
    """One model, and what can be measured of it. ``data`` and ``sampling`` default to the evaluation's."""

    def __init__(self, laboratory: Laboratory, ref: NamedModel, baseline: "Bench | None" = None) -> None:
        self.laboratory, self.ref = laboratory, ref
        self.label = ref.label
        self.baseline = baseline
        self._loaded: LoadedModel | None = None

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

    @property
    def digest(self) -> str:
        return self.laboratory.digest(self.ref)

    def release(self) -> None:
        """Make room for the next model."""
        self._loaded = None
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    # -- what benchmarks ask for

    def answered(self, data: BenchmarkRows | None, sampling: Sampling | None) -> list[tuple[Row, Reply]]:
        """Every row with the model's response."""
        rows, sampling = self.rows(data, "prompt"), self._sampling(sampling)
        limit = self._data(data).max_prompt_length
        replies = []
        for first in range(0, len(rows), BLOCK):
            block = rows[first : first + BLOCK]
            key = self._responses_key(block, first, sampling, limit)
            found = self.laboratory.cell(key, partial(self._respond, block, first, sampling, limit))
            replies += [Reply(**reply) for reply in found]
        return list(zip(rows, replies, strict=True))

    def rewards(self, data: BenchmarkRows | None, sampling: Sampling | None) -> list[float]:
        """The reward model's scores of the responses."""
        assert self.laboratory.spec.reward_model is not None
        judge = {"kind": "rewards", "judge": self.laboratory.digest(self.laboratory.spec.reward_model)}
        return self._by_block(data, sampling, judge, self._score)

    def divergences(self, data: BenchmarkRows | None, sampling: Sampling | None) -> list[Divergence]:
        """KL to the reference on the responses. Raises NotComparable for a model with other tokens."""
        assert self.laboratory.reference_ref is not None
        reference = self.laboratory.digest(self.laboratory.reference_ref)
        if reason := self._other_tokens(reference):
            raise NotComparable(reason)
        limit = self._data(data).max_prompt_length
        length = self._sampling(sampling).max_new_tokens

        def measure(answered: list[tuple[Row, Reply]]) -> list[list[float]]:
            return self._diverge(answered, limit, length)

        found = self._by_block(data, sampling, {"kind": "kl", "reference": reference}, measure)
        return [Divergence(kl, int(tokens)) for kl, tokens in found]

    def losses(self, data: BenchmarkRows | None) -> list[Loss]:
        """Losses on the rows' own responses."""
        rows = self.rows(data, "sft")
        limit = self._data(data).max_prompt_length
        found = []
        for first in range(0, len(rows), BLOCK):
            block = rows[first : first + BLOCK]
            key = {"kind": "losses", "model": self.digest, "rows": _content(block, "response"), "limit": limit}
            found += self.laboratory.cell(key, partial(self._lose, block, limit))
        return [Loss(nll, int(tokens)) for nll, tokens in found]

    def rows(self, data: BenchmarkRows | None, schema: str) -> list[Row]:
        return self.laboratory.rows(self._data(data), schema)

    # -- measurements

    def _by_block(self, data: Any, sampling: Any, key: dict[str, Any], measure: Callable[..., list[Any]]) -> list[Any]:
        """Measure the responses block by block, under their own key and ``key``."""
        answered = self.answered(data, sampling)
        limit = self._data(data).max_prompt_length
        found: list[Any] = []
        for first in range(0, len(answered), BLOCK):
            block = answered[first : first + BLOCK]
            of = self._responses_key([row for row, _ in block], first, self._sampling(sampling), limit)
            found += self.laboratory.cell({"of": of, **key}, partial(measure, block))
        return found

    def _responses_key(self, rows: list[Row], first: int, sampling: Sampling, limit: int) -> dict[str, Any]:
        return {
            "kind": "responses",
            "model": self.digest,
            "rows": _content(rows),
            "first": first,
            "limit": limit,
            # Responses do not depend on what is generated beside them.
            "sampling": sampling.document(exclude={"batch_size"}),
            "seed": self.laboratory.ctx.seed if sampling.temperature else None,
        }

    def _respond(self, rows: list[Row], first: int, sampling: Sampling, limit: int) -> list[dict[str, Any]]:
        ctx = self.laboratory.ctx
        with ctx.meter.part("rollout"):
            room = self._room(sampling.max_new_tokens)
            prompts = [Prompt(row, self._prompt(row, min(limit, room))) for row in rows]
            keys = [(ctx.seed, first + i) for i in range(len(rows))]
            samples = respond(ctx.workers, self.loaded, prompts, sampling, keys)
            mine = samples[ctx.workers.rank :: ctx.workers.world]
            ctx.meter.count(sum(len(s.ids) for s in mine), len(mine))
        return [asdict(Reply(s.text, s.ids, s.ended)) for s in samples]

    def _score(self, answered: list[tuple[Row, Reply]]) -> list[float]:
        laboratory = self.laboratory
        judge = laboratory.reward_model

        def mine(indices: Sequence[int]) -> list[float]:
            chosen = [answered[i] for i in indices]
            return response_rewards(
                laboratory.ctx.workers,
                judge,
                [prompt_messages(row) for row, _ in chosen],
                [reply.text for _, reply in chosen],
                [reply.ended for _, reply in chosen],
                context_length(judge.model),
                laboratory.spec.parallel.micro_batch_tokens,
            )

        with laboratory.ctx.meter.part("evaluation"):
            return laboratory.spread(len(answered), mine)

    def _diverge(self, answered: list[tuple[Row, Reply]], limit: int, new_tokens: int) -> list[list[float]]:
        limit = min(limit, self._room(new_tokens))
        sequences = [joined(self._prompt(row, limit), reply.ids, limit + len(reply.ids)) for row, reply in answered]
        reference = self.laboratory.reference.model
        return self._sums(sequences, lambda batch: divergence_sums(self.loaded.model, reference, batch))

    def _lose(self, rows: list[Row], limit: int) -> list[list[float]]:
        check_scoring(self.loaded.model, self.laboratory.ctx.workers.device)
        scorer = Scorer(self.loaded.model)
        sequences = [self._given(row, limit) for row in rows]
        return self._sums(sequences, lambda batch: batch.sums(-scorer(batch, target_logprobs(batch))))

    @torch.no_grad()
    def _sums(self, sequences: list[Any], measure: Callable[[Any], torch.Tensor]) -> list[list[float]]:
        """(sum, scored tokens) of each sequence, in micro-batches, without packing: any architecture can do that."""
        workers = self.laboratory.ctx.workers

        def mine(indices: Sequence[int]) -> list[list[float]]:
            found: dict[int, list[float]] = {}
            chosen = [sequences[i] for i in indices]
            plan = plan_micro_batches(
                [[len(s)] for s in chosen], self.laboratory.spec.parallel.micro_batch_tokens, False
            )
            for group in plan[0]:
                batch = collate([chosen[i] for i in group], False, workers.device)
                with workers.autocast():
                    sums = measure(batch).float().tolist()
                found |= {
                    i: list(pair)
                    for i, pair in zip(group, zip(sums, batch.counts().tolist(), strict=True), strict=True)
                }
            return [found[i] for i in range(len(chosen))]

        with self.laboratory.ctx.meter.part("evaluation"):
            return self.laboratory.spread(len(sequences), mine)

    # -- tokens

    def _prompt(self, row: Row, limit: int) -> list[int]:
        """The prompt's tokens; too long a prompt loses its left end."""
        return prompt_ids(self.loaded.chat, row)[-limit:]

    def _given(self, row: Row, limit: int) -> Tokens:
        """A row's prompt and response. A response that does not fit the model is cut, so no model skips a row."""
        chat, longest = self.loaded.chat, context_length(self.loaded.model)
        if "messages" in row:
            sequence = sft_sequence(chat, row, longest, everything=False)
        else:
            response = chat.response(row["response"])[: longest - 1]
            sequence = joined(self._prompt(row, limit), response, longest)
        if sequence is None:
            raise BadInput(f"{self.label}: a row leaves nothing to score within {longest} tokens")
        return sequence

    def _room(self, new_tokens: int) -> int:
        room = context_length(self.loaded.model) - new_tokens
        if room < 1:
            raise BadInput(f"{self.label}: sampling.maxNewTokens {new_tokens} leaves no room for a prompt")
        return room

    def _other_tokens(self, reference: str) -> str | None:
        key = {"kind": "tokens", "model": self.digest, "reference": reference}
        found = self.laboratory.cell(key, lambda: {"differ": self._compare_tokens()})
        return found["differ"]

    def _compare_tokens(self) -> str | None:
        reason = same_tokens(self.laboratory.reference.tokenizer, self.loaded.tokenizer)
        return None if reason is None else f"its tokens are not the reference's: {reason}"

    def _data(self, data: BenchmarkRows | None) -> BenchmarkRows:
        chosen = data or self.laboratory.spec.data
        assert chosen is not None
        return chosen

    def _sampling(self, sampling: Sampling | None) -> Sampling:
        return sampling or self.laboratory.spec.sampling


def _content(rows: list[Row], *keys: str) -> str:
    """Digest of what a model reads of rows, so that a changed answer key makes no model answer again."""
    return sha256_text(canonical_json([{k: row.get(k) for k in ("messages", "prompt", *keys)} for row in rows]))

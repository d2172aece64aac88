"""The reference's log-probabilities of chosen and rejected responses: computed once and stored, or at every step."""

import hashlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch

from trainers.contract import BadInput, canonical_json, sha256_text
from trainers.core.batch import Batch
from trainers.core.context import PhaseContext
from trainers.core.encode import Pair
from trainers.core.models import LoadedModel
from trainers.core.reference import Reference, load_reference
from trainers.core.scoring import Scorer, target_logprobs
from trainers.core.step import Layout, scored
from trainers.core.tensors import DamagedError, read_tensors, tensor_bytes
from trainers.core.vocabulary import check_known
from trainers.files import write_atomic
from trainers.phases.dpo.spec import DpoSpec

PairScores = Callable[[list[Pair], Batch], torch.Tensor]
"""Takes pairs and their batch (chosen, rejected, chosen, …); returns (P, 2) sums over response tokens, on the device."""


def pair_logprobs(scorer: Any, pairs: list[Pair], batch: Batch) -> torch.Tensor:
    """Log-probabilities of the pairs' responses, summed over their tokens: (P, 2); without gradients."""
    return pair_sums(pairs, scorer(batch, target_logprobs(batch), sizes=pair_sizes(pairs)))


def pair_sizes(pairs: list[Pair]) -> list[int]:
    """Scored tokens of each pair."""
    return [pair.chosen.num_scored + pair.rejected.num_scored for pair in pairs]


def pair_sums(pairs: list[Pair], tokens: torch.Tensor) -> torch.Tensor:
    """Numbers of the pairs' response tokens, (k,), summed over each response: (P, 2)."""
    counts = torch.tensor([s.num_scored for pair in pairs for s in (pair.chosen, pair.rejected)], dtype=torch.long)
    response = torch.repeat_interleave(torch.arange(2 * len(pairs)), counts).to(tokens.device)
    return tokens.new_zeros(2 * len(pairs)).index_add(0, response, tokens).view(-1, 2)


def reference_for(
    spec: DpoSpec, ctx: PhaseContext, policy: LoadedModel, layout: Layout[Pair], batches: dict[str, list[list[Pair]]]
) -> tuple[PairScores, list[Any]]:
    """The spec's reference for these batches of pairs, by name, and the models that it keeps in memory.

    Call it while the policy still has its first weights.

    Pairs are scored in the forward passes in which the steps will see them first. So a reference that is the policy
    at the start gives the first step the very same numbers: rounding depends on what shares a forward pass.
    """
    if spec.reference_scores == "precompute":
        return _stored(spec, ctx, policy, layout, batches), []
    reference = _reference(spec, ctx, policy, batches)
    return _live(ctx, layout, reference), [reference.loaded.model]


def _reference(
    spec: DpoSpec, ctx: PhaseContext, policy: LoadedModel, batches: dict[str, list[list[Pair]]], stays: bool = True
) -> Reference:
    """Raises BadInput if the reference does not know a token of some pair."""
    reference = load_reference(ctx, spec.reference, spec.policy, policy, stays)
    for name, found in batches.items():
        ids = (sequence.ids for batch in found for pair in batch for sequence in pair.sequences)
        check_known(ids, reference.loaded.num_known, policy.tokenizer, f"data.{name}", "reference")
    return reference


def _live(ctx: PhaseContext, layout: Layout[Pair], reference: Reference) -> PairScores:
    """Scores beside the policy, of the same batches. Raises BadInput if the reference cannot read them."""
    if layout.packing and not reference.loaded.packs:
        kind = reference.loaded.model.config.model_type
        raise BadInput(f"reference: models of type {kind} need rows of their own, so set data.packing: false")
    scorer = Scorer(reference.loaded.model)

    def score(pairs: list[Pair], batch: Batch) -> torch.Tensor:
        with reference.scoring():
            return pair_logprobs(scorer, pairs, batch)

    return score


def _stored(
    spec: DpoSpec, ctx: PhaseContext, policy: LoadedModel, layout: Layout[Pair], batches: dict[str, list[list[Pair]]]
) -> PairScores:
    """Scores from files in the phase's directory, made first where they are missing or damaged.

    A file's name is a digest of the reference and of the tokens it scored, so a resumed phase finds its own and
    nothing else, whatever happened to data or models in between.
    """
    folder = ctx.dir.root / "reference"
    # By the pair's id(): the lists keep the pairs alive. A step may see a pair twice; the first score counts.
    pairs = {
        name: list({id(pair): pair for batch in found for pair in batch}.values()) for name, found in batches.items()
    }
    paths = {name: folder / f"{_key(spec, ctx, policy, found)}.safetensors" for name, found in pairs.items()}
    found = {name: _read(path) for name, path in paths.items()}
    scores: dict[int, torch.Tensor] = {}
    if ctx.workers.any(any(rows is None for rows in found.values())):
        score = _live(ctx, layout, _reference(spec, ctx, policy, batches, stays=False))
        for name, path in paths.items():
            ctx.meter.stage(f"reference scores of data.{name}")
            scores |= _all_scores(ctx, layout, score, batches[name])
            _store(ctx, path, torch.stack([scores[id(pair)] for pair in pairs[name]]))
        ctx.workers.barrier()
    else:
        for name, rows in found.items():
            scores |= {id(pair): row for pair, row in zip(pairs[name], cast(torch.Tensor, rows), strict=True)}

    def look_up(wanted: list[Pair], batch: Batch) -> torch.Tensor:
        rows = [scores[id(pair)] for pair in wanted]
        return torch.stack(rows).to(ctx.workers.device) if rows else torch.zeros(0, 2, device=ctx.workers.device)

    return look_up


def _all_scores(
    ctx: PhaseContext, layout: Layout[Pair], score: PairScores, batches: list[list[Pair]]
) -> dict[int, torch.Tensor]:
    """Scores of all pairs by their id(), (2,) on the CPU each; every process computes its share of every batch."""

    def stoppable(some: list[Pair], batch: Batch) -> list[list[float]]:
        ctx.stop_if_asked()
        return score(some, batch).tolist()

    found: dict[int, torch.Tensor] = {}
    for batch in batches:
        for pair, row in zip(batch, torch.tensor(scored(ctx.workers, layout, batch, stoppable)), strict=True):
            found.setdefault(id(pair), row)
    return found


def _read(path: Path) -> torch.Tensor | None:
    """Stored scores, (P, 2), or None."""
    try:
        return read_tensors(path)["logprobs"] if path.exists() else None
    except (DamagedError, KeyError) as error:
        print(f"{path} cannot be used ({error}): its pairs are scored again", file=sys.stderr)
        return None


def _store(ctx: PhaseContext, path: Path, scores: torch.Tensor) -> None:
    if ctx.workers.is_main:
        write_atomic(path, tensor_bytes({"logprobs": scores}))
        ctx.keep(path)


def _key(spec: DpoSpec, ctx: PhaseContext, policy: LoadedModel, pairs: list[Pair]) -> str:
    """Identity of stored scores: which reference, in which arithmetic, on which tokens."""
    ref = spec.reference or spec.policy
    identity = {
        "reference": ref.document(),
        "input": ctx.file.inputs[ref.phase].digest if ref.phase in ctx.file.inputs else None,
        "files": _file_marks(Path(ctx.model_location(ref))) if ref.scratch is None else ctx.seed,
        "bf16": ctx.workers.bf16,
        "held": str(policy.model.dtype),
        "tokens": _tokens_digest(pairs),
    }
    return sha256_text(canonical_json(identity))[:32]


def _file_marks(folder: Path) -> list[tuple[str, int, int]]:
    """Name, size and time of a local model's files: enough to notice that it was replaced, and quick for any size."""
    files = sorted(folder.glob("*.safetensors")) if folder.is_dir() else []
    return [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]


def _tokens_digest(pairs: list[Pair]) -> str:
    digest = hashlib.sha256()
    for pair in pairs:
        for sequence in (pair.chosen, pair.rejected):
            digest.update(f"{len(sequence)} {sequence.num_scored}\0".encode())
            digest.update(sequence.ids.tobytes())
    return digest.hexdigest()

"""The reference's log-probabilities of chosen and rejected responses: computed once and stored, or at every step."""

import hashlib
import sys
from collections.abc import Callable, Iterable, Iterator
from itertools import chain, islice
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

from trainers.contract import BadInput, canonical_json, sha256_text
from trainers.core.batch import Batch
from trainers.core.context import PhaseContext
from trainers.core.encode import Pair
from trainers.core.examples import HELD_ROWS
from trainers.core.models import LoadedModel
from trainers.core.reference import Reference, load_reference
from trainers.core.scoring import Scorer, target_logprobs
from trainers.core.step import Layout, scored
from trainers.core.tensors import DamagedError, read_tensors, tensor_bytes
from trainers.core.vocabulary import check_known
from trainers.files import write_atomic
from trainers.phases.dpo.spec import DpoSpec

Batches = dict[str, Callable[[], Iterator[list[Pair]]]]
"""By name: the batches in which the steps see pairs for the first time, as often as they are asked for."""

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
    spec: DpoSpec, ctx: PhaseContext, policy: LoadedModel, layout: Layout[Pair], batches: Batches
) -> tuple[PairScores, list[Any]]:
    """The spec's reference for these batches of pairs, by name, and the models that it keeps in memory.

    Call it while the policy still has its first weights.

    Pairs are scored in the forward passes in which the steps will see them first. So a reference that is the policy
    at the start gives the first step the very same numbers: rounding depends on what shares a forward pass.
    """
    if spec.reference_scores == "precompute":
        return _stored(spec, ctx, policy, layout, batches), []
    reference = _reference(spec, ctx, policy, batches)
    return _live(ctx, layout, reference, policy), [reference.loaded.model]


def _reference(
    spec: DpoSpec, ctx: PhaseContext, policy: LoadedModel, batches: Batches, stays: bool = True
) -> Reference:
    """Raises BadInput if the reference does not know a token of some pair; of many pairs, only the first are looked at."""
    reference = load_reference(ctx, spec.reference, spec.policy, policy, stays)
    for name, found in batches.items():
        first = islice(chain.from_iterable(found()), HELD_ROWS)
        _check_known(reference, policy, first, f"data.{name}")
    return reference


def _check_known(reference: Reference, policy: LoadedModel, pairs: Iterable[Pair], where: str) -> None:
    ids = (sequence.ids for pair in pairs for sequence in pair.sequences)
    check_known(ids, reference.loaded.num_known, policy.tokenizer, where, "reference")


def _live(ctx: PhaseContext, layout: Layout[Pair], reference: Reference, policy: LoadedModel) -> PairScores:
    """Scores beside the policy, of the same batches. Raises BadInput if the reference cannot read them."""
    if layout.packing and not reference.loaded.packs:
        kind = reference.loaded.model.config.model_type
        raise BadInput(f"reference: models of type {kind} need rows of their own, so set data.packing: false")
    scorer = Scorer(reference.loaded.model)

    def score(pairs: list[Pair], batch: Batch) -> torch.Tensor:
        _check_known(reference, policy, pairs, "data")
        with reference.scoring():
            return pair_logprobs(scorer, pairs, batch)

    return score


def _stored(
    spec: DpoSpec, ctx: PhaseContext, policy: LoadedModel, layout: Layout[Pair], batches: Batches
) -> PairScores:
    """Scores from files in the phase's directory, made first where they are missing or damaged.

    A file's name is a digest of the reference and of the tokens it scored, so a resumed phase finds its own and
    nothing else, whatever happened to data or models in between.
    """
    folder = ctx.dir.root / "reference"
    # A step may see a pair twice; the first score counts.
    seen = {name: _keys(pair for batch in found() for pair in batch) for name, found in batches.items()}
    first = {name: np.sort(np.unique(found, return_index=True)[1]) for name, found in seen.items()}
    keys = {name: seen[name][places] for name, places in first.items()}
    paths = {name: folder / f"{_key(spec, ctx, policy, found)}.safetensors" for name, found in keys.items()}
    stored = {name: _read(path) for name, path in paths.items()}
    if ctx.workers.any(any(rows is None for rows in stored.values())):
        score = _live(ctx, layout, _reference(spec, ctx, policy, batches, stays=False), policy)
        for name, path in paths.items():
            ctx.meter.stage(f"reference scores of data.{name}")
            stored[name] = scores = _all_scores(ctx, layout, score, batches[name]())[first[name]]
            _store(ctx, path, scores)
        ctx.workers.barrier()
    return _look_up(ctx, np.concatenate([*keys.values()]), torch.cat([*cast(dict[str, torch.Tensor], stored).values()]))


def _look_up(ctx: PhaseContext, keys: np.ndarray, scores: torch.Tensor) -> PairScores:
    """The scores (P, 2) by the pairs' keys (P,)."""
    order = np.argsort(keys, kind="stable")

    def look_up(wanted: list[Pair], batch: Batch) -> torch.Tensor:
        places = order[np.searchsorted(keys, _keys(wanted), sorter=order)]
        return scores[places].to(ctx.workers.device)

    return look_up


def _keys(pairs: Iterable[Pair]) -> np.ndarray:
    return np.fromiter(map(_pair_key, pairs), dtype=np.uint64)


def _pair_key(pair: Pair) -> int:
    """A digest of a pair's tokens. Of ten million pairs two have the same by chance once in 400,000 runs."""
    digest = hashlib.blake2b(digest_size=8)
    for sequence in pair.sequences:
        digest.update(f"{len(sequence)} {sequence.num_scored}\0".encode())
        digest.update(sequence.ids.tobytes())
    return int.from_bytes(digest.digest(), "little")


def _all_scores(
    ctx: PhaseContext, layout: Layout[Pair], score: PairScores, batches: Iterator[list[Pair]]
) -> torch.Tensor:
    """Scores of all pairs in order, (P, 2) on the CPU; every process computes its share of every batch."""

    def stoppable(some: list[Pair], batch: Batch) -> list[list[float]]:
        ctx.stop_if_asked()
        return score(some, batch).tolist()

    return torch.cat([torch.tensor(scored(ctx.workers, layout, batch, stoppable)) for batch in batches])


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


def _key(spec: DpoSpec, ctx: PhaseContext, policy: LoadedModel, keys: np.ndarray) -> str:
    """Identity of stored scores: which reference, in which arithmetic, on which tokens."""
    ref = spec.reference or spec.policy
    identity = {
        "reference": ref.document(),
        "input": ctx.file.inputs[ref.phase].digest if ref.phase in ctx.file.inputs else None,
        "files": _file_marks(Path(ctx.model_location(ref))) if ref.scratch is None else ctx.seed,
        "bf16": ctx.workers.bf16,
        "held": str(policy.model.dtype),
        "tokens": hashlib.sha256(keys.tobytes()).hexdigest(),
    }
    return sha256_text(canonical_json(identity))[:32]


def _file_marks(folder: Path) -> list[tuple[str, int, int]]:
    """Name, size and time of a local model's files: enough to notice that it was replaced, and quick for any size."""
    files = sorted(folder.glob("*.safetensors")) if folder.is_dir() else []
    return [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]

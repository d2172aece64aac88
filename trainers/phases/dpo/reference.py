"""The reference's log-probabilities of chosen and rejected responses: computed once and stored, or at every step."""

import hashlib
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save

from trainers.contract import BadInput, canonical_json, sha256_text
from trainers.core.batch import Batch
from trainers.core.context import PhaseContext
from trainers.core.encode import Pair
from trainers.core.models import LoadedModel, load_causal_lm
from trainers.core.scoring import Scorer, check_scoring, target_logprobs
from trainers.core.step import Layout, in_eval_mode, scored
from trainers.files import write_atomic
from trainers.phases.dpo.spec import DpoSpec

Reference = Callable[[list[Pair], Batch], torch.Tensor]
"""Takes pairs and their batch (chosen, rejected, chosen, …); returns (P, 2) sums over response tokens, on the device."""


def pair_logprobs(scorer: Any, pairs: list[Pair], batch: Batch) -> torch.Tensor:
    """Log-probabilities of the pairs' responses, summed over their tokens: (P, 2)."""
    return batch.sums(scorer(batch, target_logprobs(batch)))[: 2 * len(pairs)].view(-1, 2)


def reference_for(
    spec: DpoSpec, ctx: PhaseContext, policy: LoadedModel, layout: Layout[Pair], pairs: dict[str, list[Pair]]
) -> Reference:
    """The spec's reference for these lists of pairs, by name. Call it while the policy still has its first weights."""
    if spec.reference_scores == "precompute":
        return _stored(spec, ctx, policy, layout, pairs)
    return _live(ctx, *_model(spec, ctx, policy, stays=True))


def _live(ctx: PhaseContext, model: LoadedModel, unchanged: Callable[[], AbstractContextManager[None]]) -> Reference:
    """Scores beside the policy. ``unchanged`` makes the model what it was at the start."""
    scorer = Scorer(model.model)

    @torch.no_grad()
    def score(pairs: list[Pair], batch: Batch) -> torch.Tensor:
        with in_eval_mode(scorer), unchanged(), ctx.workers.autocast():
            return pair_logprobs(scorer, pairs, batch)

    return score


def _stored(
    spec: DpoSpec, ctx: PhaseContext, policy: LoadedModel, layout: Layout[Pair], pairs: dict[str, list[Pair]]
) -> Reference:
    """Scores from files in the phase's directory, made first where they are missing.

    A file's name is a digest of the reference and of the tokens it scored, so a resumed phase finds its own and
    nothing else, whatever happened to data or models in between.
    """
    folder = ctx.dir.root / "reference"
    paths = {name: folder / f"{_key(spec, ctx, policy, found)}.safetensors" for name, found in pairs.items()}
    if ctx.workers.any(not all(path.exists() for path in paths.values())):
        model, unchanged = _model(spec, ctx, policy, stays=False)
        score = _live(ctx, model, unchanged)
        found = {}
        for name, path in paths.items():
            ctx.meter.stage(f"reference scores of data.{name}")
            found[name] = _all_scores(ctx, layout, score, pairs[name])
            _store(ctx, path, found[name])
        ctx.workers.barrier()
    else:
        found = {name: load_file(path)["logprobs"] for name, path in paths.items()}
    scores: dict[int, torch.Tensor] = {}  # by the pair's id(): the lists above keep the pairs alive
    for name, rows in found.items():
        scores |= {id(pair): row for pair, row in zip(pairs[name], rows, strict=True)}

    def look_up(wanted: list[Pair], batch: Batch) -> torch.Tensor:
        rows = [scores[id(pair)] for pair in wanted]
        return torch.stack(rows).to(ctx.workers.device) if rows else torch.zeros(0, 2, device=ctx.workers.device)

    return look_up


def _all_scores(ctx: PhaseContext, layout: Layout[Pair], score: Reference, pairs: list[Pair]) -> torch.Tensor:
    """Scores of all pairs, each process computing its share: (P, 2), CPU."""

    def stoppable(some: list[Pair], batch: Batch) -> list[list[float]]:
        ctx.stop_if_asked()
        return score(some, batch).tolist()

    return torch.tensor(scored(ctx.workers, layout, pairs, stoppable))


def _store(ctx: PhaseContext, path: Path, scores: torch.Tensor) -> None:
    if ctx.workers.is_main:
        write_atomic(path, save({"logprobs": scores}))
        ctx.keep(path)


def _model(
    spec: DpoSpec, ctx: PhaseContext, policy: LoadedModel, stays: bool
) -> tuple[LoadedModel, Callable[[], AbstractContextManager[None]]]:
    """The model that scores, and what to do around scoring. ``stays``: it must not change when the policy is trained."""
    if spec.reference is not None:
        model = load_causal_lm(ctx, spec.reference, frozen=True, like=policy)
        if model.tokenizer.get_vocab() != policy.tokenizer.get_vocab():
            raise BadInput(
                "reference: its tokens have other ids than the policy's; use a model with the same vocabulary"
            )
        check_scoring(model, ctx.workers)
        return model, nullcontext
    if policy.adapters is not None:
        return policy, policy.adapters.disable_adapter
    if stays:
        return load_causal_lm(ctx, spec.policy, frozen=True, like=policy), nullcontext
    return policy, nullcontext


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

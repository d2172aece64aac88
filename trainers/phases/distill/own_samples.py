"""Responses of the student's own as what it learns from, weighed where other weights than its own have sampled them."""

from collections.abc import Sequence as List
from dataclasses import replace

import torch

from trainers.core.batch import Packing, Sequence
from trainers.core.context import PhaseContext
from trainers.core.encode import joined
from trainers.core.importance import Importance, prefix_importance, sampler_logprobs
from trainers.core.rollouts import Sample
from trainers.core.step import Layout, in_eval_mode
from trainers.core.token_scores import logprobs_of, score_tokens, token_mask
from trainers.core.trainee import Trainee
from trainers.phases.distill.data import Example, teacher_of
from trainers.phases.distill.spec import DistillSpec


def own_batch(
    spec: DistillSpec, ctx: PhaseContext, student: Trainee, packing: bool | Packing, samples: List[Sample], step: int
) -> tuple[list[Example], dict[str, float]]:
    """The student's responses, behind their prompts, and how far it is from what sampled them.

    None of them is shortened: together they fit (:func:`.data._prompts`).
    """
    teachers = [teacher.name for teacher in spec.teachers]
    found = [(joined(s.prompt.ids, s.ids, spec.max_length), s) for s in samples]
    batch = [
        Example(sequence, s.reward, teacher=teacher_of(s.prompt.row, teachers))
        for sequence, s in found
        if sequence is not None
    ]
    if not batch or not spec.corrects:
        return batch, {}
    importance = _importance(spec, ctx, student, samples, batch, packing)
    measures = importance.measures | {"staleness": min(step, spec.staleness)}
    return _weighed(batch, importance.weights), measures


def _importance(
    spec: DistillSpec,
    ctx: PhaseContext,
    student: Trainee,
    samples: List[Sample],
    batch: List[Example],
    packing: bool | Packing,
) -> Importance:
    """What a batch's tokens weigh: a divergence is a function of the tokens before, as the student says them over the sampler."""
    sequences = [example.sequence for example in batch]
    layout = Layout[Sequence](lambda sequence: [sequence], spec.parallel.micro_batch_tokens, packing)
    with in_eval_mode(student.module):
        scores = logprobs_of(student.module, spec.sampling.temperature or 1.0)
        (policy,) = score_tokens(ctx.workers, layout, sequences, [scores])
    mask = token_mask(sequences)
    return prefix_importance(policy, sampler_logprobs(samples, mask.shape[1]), mask, spec.importance_cap)


def _weighed(batch: list[Example], weights: torch.Tensor | None) -> list[Example]:
    if weights is None:
        return batch
    return [replace(e, importance=row[: e.num_tokens]) for e, row in zip(batch, weights, strict=True)]

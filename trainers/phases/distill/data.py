"""What distillation learns on: stored traces of a teacher, and prompts that the student answers itself."""

import math
from collections.abc import Sequence as List
from dataclasses import dataclass
from functools import partial

import torch

from trainers.contract import BadInput
from trainers.core.batch import Sequence
from trainers.core.chat import ChatFormat
from trainers.core.context import PhaseContext
from trainers.core.encode import joined, prompt_messages
from trainers.core.examples import Encoding, Examples, Steps, no_steps, open_examples
from trainers.core.models import LoadedModel, length_limit
from trainers.core.rollouts import Prompt, check_room, short_prompts
from trainers.core.rows import Row
from trainers.core.top_k import FOLDER, NOWHERE, Place, shards_in, vocabulary_digest
from trainers.core.vocabulary import check_known
from trainers.fingerprints import source_files
from trainers.phases.distill.spec import DistillSpec
from trainers.phases.distill.streams import Streams
from trainers.spec import DataSource, RowPolicy


@dataclass(frozen=True)
class Example:
    """A response to learn on, after its prompt."""

    sequence: Sequence
    reward: float
    weight: float = 1.0
    scores: Place = NOWHERE
    """Where the teacher's log-probabilities of the response are, if it is not in memory."""
    teacher: str = ""
    """Its name, if there are several."""
    importance: torch.Tensor | None = None
    """Weights of its tokens, if others sampled them than learn from them."""

    @property
    def num_tokens(self) -> int:
        """Of the response."""
        return self.sequence.num_scored

    @property
    def mass(self) -> float:
        """Sum of its tokens' weights."""
        return self.num_tokens if self.importance is None else float(self.importance.sum())

    @property
    def shortened(self) -> int:
        return self.sequence.shortened


def open_streams(
    spec: DistillSpec, ctx: PhaseContext, known: int | None, student: LoadedModel, streams: Streams
) -> tuple[Steps[Example], Steps[Prompt], int]:
    """Steps on traces and on prompts, and how many there are of both. What the fraction leaves out has none.

    ``known``: ids below this are what the teacher knows, if it is there to be asked.
    """
    traces, prompts = _traces(spec, ctx, student, known), _prompts(spec, ctx, student, known)
    leading = prompts if traces is None else traces
    assert leading is not None, "the spec asks for one of them"
    duration = spec.duration
    wanted = leading.steps(spec.batch_size, duration.epochs, duration.max_steps).total_steps
    total_steps = duration.max_steps or streams.total_steps(wanted)
    on_policy = sum(map(streams.on_policy, range(total_steps)))
    on_prompts = duration.max_steps if leading is prompts else on_policy
    on_traces = duration.max_steps and total_steps - on_policy
    return (
        no_steps() if traces is None else traces.steps(spec.batch_size, duration.epochs, on_traces),
        no_steps() if prompts is None else prompts.steps(spec.batch_size, duration.epochs, on_prompts),
        total_steps,
    )


def _traces(spec: DistillSpec, ctx: PhaseContext, student: LoadedModel, known: int | None) -> Examples[Example] | None:
    if spec.traces is None or spec.on_policy_fraction == 1:
        return None
    files = _trace_files(spec, ctx)
    longest = length_limit(student, spec.max_length)

    def check(examples: list[Example]) -> None:
        check_known((e.sequence.ids for e in examples), known, student.tokenizer, "traces", "teacher")

    # A teacher may say things that cannot be learned, such as its end token's text: no reason to stop.
    encode = partial(_examples, student.chat, longest, tuple(teacher.name for teacher in spec.teachers))
    if spec.reads_scores:
        vocabulary = (vocabulary_digest(student.tokenizer), student.num_known or 0)
        encode = partial(_scored_examples, shard_folders(spec, ctx), *vocabulary, student.chat, longest)
    encoding = Encoding("traces", encode, Example, check, skips=True)
    policy = RowPolicy(min_rows=spec.traces.min_rows)
    return open_examples(ctx, (DataSource(files=files),), encoding, policy, "traces")


def _trace_files(spec: DistillSpec, ctx: PhaseContext) -> str:
    assert spec.traces is not None
    return spec.traces.files or str(ctx.artifact(spec.traces).resolve())


def shard_folders(spec: DistillSpec, ctx: PhaseContext) -> tuple[str, ...]:
    """Where a teacher's log-probabilities lie beside traces."""
    files = source_files(_trace_files(spec, ctx), ctx.base_dir)
    return tuple(sorted({str(path.resolve().parent / FOLDER) for path in files}))


def _examples(chat: ChatFormat, max_length: int, teachers: tuple[str, ...], row: Row) -> list[Example]:
    if not math.isfinite(row["reward"]):
        raise BadInput(f"traces: the reward of {row['prompt'][:60]!r} is {row['reward']}")
    prompt, response = chat.taught(prompt_messages(row), row["teacher_response"], row.get("ended", True))
    sequence = joined(prompt, response, max_length) if response else None
    if sequence is None:
        return []
    return [Example(sequence, float(row["reward"]), teacher=teacher_of(row, teachers))]


def teacher_of(row: Row, teachers: List[str]) -> str:
    """Whom a row is learned from; nobody in particular where there is one. Raises BadInput for any other name, or none."""
    if not teachers:
        return ""
    name = row.get("teacher")
    if name is None:
        raise BadInput(f"the row has no teacher: it must name one of teachers ({', '.join(teachers)})")
    if name not in teachers:
        raise BadInput(f"the row's teacher is {name!r}, which is none of teachers ({', '.join(teachers)})")
    return str(name)


def _scored_examples(
    folders: tuple[str, ...], vocabulary: str, known: int, chat: ChatFormat, max_length: int, row: Row
) -> list[Example]:
    """The very tokens that the teacher scored. Raises BadInput if the student's format makes others of the prompt."""
    if not math.isfinite(row["reward"]):
        raise BadInput(f"traces: the reward of {row['prompt'][:60]!r} is {row['reward']}")
    prompt, response, place = shards_in(folders).read(row, vocabulary, known)
    if chat.prompt(prompt_messages(row)) != prompt:
        raise BadInput(
            "the student's chat template makes other tokens of the prompt: set chatTemplate to the teacher's"
        )
    if row.get("ended", True) and response[-1] not in chat.stop_ids:
        token = chat.tokenizer.convert_ids_to_tokens(response[-1])
        raise BadInput(f"the response ends with {token!r}, which does not end the student's: set endToken to it")
    sequence = joined(prompt, response, max_length)
    return [] if sequence is None else [Example(sequence, float(row["reward"]), scores=place)]


def _prompts(spec: DistillSpec, ctx: PhaseContext, student: LoadedModel, known: int | None) -> Examples[Prompt] | None:
    if spec.prompts is None or spec.on_policy_fraction == 0:
        return None
    # A sample that did not fit maxLength would be trained behind another prompt than it was sampled from.
    longest = min(spec.prompts.max_prompt_length, spec.max_length - spec.sampling.max_new_tokens)
    data = spec.prompts.model_copy(update={"max_prompt_length": longest})
    teachers = tuple(teacher.name for teacher in spec.teachers)

    def check(prompts: list[Prompt]) -> None:
        check_room(student, prompts, spec.sampling, spec.server)
        check_known((p.ids for p in prompts), known, student.tokenizer, "prompts", "teacher")

    encoding = Encoding("prompt", partial(_taught_prompts, teachers, student.chat, longest), Prompt, check)
    return open_examples(ctx, data.prompts, encoding, data, "prompts.prompts")


def _taught_prompts(teachers: tuple[str, ...], chat: ChatFormat, longest: int, row: Row) -> list[Prompt]:
    teacher_of(row, teachers)
    return short_prompts(chat, longest, row)

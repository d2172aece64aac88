"""Everything that can be known to be wrong with a run before anything starts; the part that looks at files included."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from controller.api.problems import InvalidRun, Problem, from_validation, nearest, shown
from controller.api.run import MEMBERS, AlignmentRun, Phase, PhaseEntry
from controller.chat_problems import end_token_problems, template_problems
from controller.compose import Document
from controller.first_rows import row_problems
from controller.plan.adapted import adapter_problems
from controller.plan.check import check_entries, check_run
from controller.plan.pods import said_twice
from controller.plan.room import room_problems
from controller.plan.shapes import Configs, sources
from controller.plan.tokenizers import model_pairs, root
from trainers.contract import BadInput, PhaseType
from trainers.fingerprints import source_files
from trainers.model_files import model_problem
from trainers.phases import phase_type
from trainers.sizing.configs import read_configs
from trainers.spec import (
    DataSource,
    DeepSpeed,
    ModelRef,
    RewardModelRef,
    SpecModel,
    SyntheticData,
    TracesRef,
    find_models,
    is_address,
)
from trainers.synthetic import TASKS
from trainers.vocabulary import Vocabulary, other_tokens, stored_vocabulary
from trainers.zero_config import zero_config

HUB_ID = re.compile(r"([A-Za-z0-9._-]{1,96}/)?[A-Za-z0-9._-]{1,96}")


def load_run(document: Document, base_dir: Path | None = None, local: bool = False) -> AlignmentRun:
    """The run in a document. Raises InvalidRun with every problem; files are looked for if ``base_dir`` is given."""
    try:
        run = AlignmentRun.model_validate(document)
    except ValidationError as error:
        problems = from_validation(error, AlignmentRun, document)
        raise InvalidRun([*problems, *_problems_of_the_readable(document)]) from error
    problems = check_run(run)
    problems += said_twice(run)
    if local:
        problems += _local_problems(run)
    if base_dir is not None:
        problems += file_problems(run, base_dir)
        if not problems:
            problems += [
                p for e in run.phases for p in row_problems(f"spec.phases[{e.name}].{e.type.name}", e.spec, base_dir)
            ]
        if not problems:  # follows references, which have to be sound for that
            configs = _configs(run, base_dir)
            problems += [
                *_tokenizer_problems(run, base_dir),
                *room_problems(run, configs),
                *adapter_problems(run, configs),
            ]
    if problems:
        raise InvalidRun(problems)
    return run


def _problems_of_the_readable(document: Document) -> list[Problem]:
    """References between the phases that can be read, so that one typing error does not hide another."""
    spec = document.get("spec")
    items = spec.get("phases") if isinstance(spec, dict) else None
    if not isinstance(items, list):
        return []
    entries, types = [], {}
    for item in items:
        if isinstance(item, dict) and isinstance(item.get("name"), str):
            types[item["name"]] = _type_of(item)
            entries += _entry(item)
    return check_entries(entries, types)


def _type_of(item: dict[str, Any]) -> PhaseType | None:
    found = [member for member in MEMBERS if item.get(member) is not None]
    return phase_type(found[0]) if len(found) == 1 else None


def _entry(item: dict[str, Any]) -> list[PhaseEntry]:
    try:
        return [Phase.model_validate(item)]
    except ValidationError:
        return []


def _local_problems(run: AlignmentRun) -> Iterator[Problem]:
    templates = [("spec.template", run.spec.template)]
    templates += [(f"spec.phases[{entry.name}].template", entry.template) for entry in run.phases if entry.template]
    for path, template in templates:
        if template.nodes is not None and template.nodes > 1:
            yield Problem(
                f"{path}.nodes", f"{template.nodes}: a local run has one machine; set 1, or apply the run to a cluster"
            )


# ---------------------------------------------------------------- files


def file_problems(run: AlignmentRun, base_dir: Path) -> list[Problem]:
    """Data and models that are not there. Hub names are left to the phase that loads them."""
    problems: list[Problem] = []
    places: list[tuple[str, SpecModel]] = [(f"spec.phases[{e.name}].{e.type.name}", e.spec) for e in run.phases]
    if run.spec.model is not None:
        places.append(("spec.model", run.spec.model))
    for place, spec in places:
        problems += _file_problems(place, spec, base_dir)
    return problems


def _file_problems(place: str, spec: SpecModel, base_dir: Path) -> Iterator[Problem]:
    for path, source in _find(spec, DataSource):
        yield from _data_problems(_join(place, path), source, base_dir)
    for path, settings in _find(spec, DeepSpeed):
        yield from _deepspeed_problems(f"{_join(place, path)}.config", settings, base_dir)
    for path, traces in _find(spec, TracesRef):
        if traces.files is not None:
            yield from _missing_files(f"{_join(place, path)}.files", traces.files, base_dir)
    models: list[tuple[str, ModelRef | RewardModelRef]] = [*_find(spec, ModelRef), *_find(spec, RewardModelRef)]
    for path, model in models:
        if model.source is not None:
            where = f"{_join(place, path)}.source"
            yield from _looked_up(where, model.source, _model_problems(where, model.source, base_dir))
        if model.chat_template is not None:
            where = f"{_join(place, path)}.chatTemplate"
            yield from _looked_up(where, model.chat_template, template_problems(where, model, base_dir))
        if model.end_token is not None and model.source is not None:
            where = f"{_join(place, path)}.endToken"
            yield from end_token_problems(where, model.end_token, base_dir / model.source)


def _looked_up(path: str, name: str, problems: Iterator[Problem]) -> Iterator[Problem]:
    """The problems; what the file system refuses (a name too long, a folder that may not be read) is one too."""
    try:
        yield from problems
    except OSError as error:
        yield Problem(path, f"{shown(name)} cannot be looked up: {error.strerror}")


T = TypeVar("T", bound=SpecModel)


def _find(spec: SpecModel, kind: type[T]) -> Iterator[tuple[str, T]]:
    if isinstance(spec, kind):
        yield "", spec
    yield from find_models(spec, kind)


def _join(place: str, path: str) -> str:
    return f"{place}.{path}" if path else place


def _data_problems(path: str, source: DataSource, base_dir: Path) -> Iterator[Problem]:
    if source.files is not None:
        yield from _missing_files(f"{path}.files", source.files, base_dir)
    if source.hub is not None:
        yield from _place_problems(f"{path}.hub.name", source.hub.name, base_dir)
    if source.synthetic is not None:
        yield from _synthetic_problems(f"{path}.synthetic", source.synthetic)


def _missing_files(path: str, pattern: str, base_dir: Path) -> Iterator[Problem]:
    if is_address(pattern):
        return  # the phase looks there, with its own credentials
    try:
        source_files(pattern, base_dir)
    except BadInput as error:
        if isinstance(error.__cause__, OSError):
            yield Problem(path, f"{shown(pattern)} cannot be looked up: {error.__cause__.strerror}")
        elif any(char in pattern for char in "*?["):
            yield Problem(path, f"{shown(pattern)} matches no file (relative paths start at {base_dir.resolve()})")
        else:
            place = (base_dir / pattern).absolute()
            yield Problem(path, f"{shown(pattern)} is not there: {place} does not exist or is not a file")


def _deepspeed_problems(path: str, settings: DeepSpeed, base_dir: Path) -> Iterator[Problem]:
    """Of a file that is there; where the run is applied to a cluster, the phase looks for it in its own place."""
    try:
        zero_config(settings, base_dir)
    except BadInput as error:
        yield Problem(path, str(error).removeprefix("parallel.deepspeed.config "))


def _synthetic_problems(path: str, wanted: SyntheticData) -> Iterator[Problem]:
    if wanted.task not in TASKS:
        yield Problem(
            f"{path}.task",
            f'"{wanted.task}" is not a synthetic task; tasks are: {", ".join(TASKS)}{nearest(wanted.task, TASKS)}',
        )
        return
    splits = TASKS[wanted.task].SPLITS
    if wanted.split not in splits:
        near = nearest(wanted.split, splits)
        yield Problem(
            f"{path}.split", f'"{wanted.split}" is not a split of {wanted.task}; splits are: {", ".join(splits)}{near}'
        )


def _model_problems(path: str, source: str, base_dir: Path) -> Iterator[Problem]:
    """A folder must hold a model. `org/name` is a hub id unless there is such a folder."""
    if source.startswith("package:") or "://" in source:
        return
    folder = base_dir / source
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            yield Problem(
                path,
                f'"{source}" is a folder without config.json; a model saved by Hugging Face transformers is expected',
            )
        elif (problem := model_problem(folder)) is not None:
            yield Problem(path, f'"{source}" holds no model that can be loaded: {problem}')
    else:
        yield from _place_problems(path, source, base_dir)


def _place_problems(path: str, name: str, base_dir: Path) -> Iterator[Problem]:
    """Of a folder, or of a hub id, which is left to the phase that loads it."""
    folder = base_dir / name
    if folder.is_dir():
        return
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        yield Problem(path, f"{shown(name)} is not there: {folder.absolute()} does not exist")
    elif not HUB_ID.fullmatch(name):
        yield Problem(path, f"{shown(name)} is no folder, and no hub id, which is `name` or `owner/name`")


def _configs(run: AlignmentRun, base_dir: Path) -> Configs:
    """Of models in folders; a hub is not asked for the sake of this."""
    return read_configs({(name, rev) for name, rev in sources(run) if (base_dir / name).is_dir()}, base_dir)


def _tokenizer_problems(run: AlignmentRun, base_dir: Path) -> Iterator[Problem]:
    """Pairs of models in local folders whose vocabularies differ."""
    entries = {entry.name: entry for entry in run.phases}
    for entry in run.phases:
        for path, first, second in model_pairs(entry):
            sources = [root(ref, entry, entries, run.spec.model) for ref in (first, second)]
            folders = [base_dir / s.source for s in sources if s is not None and s.source is not None]
            stored = [found for folder in folders if (found := _vocabulary(folder)) is not None]
            if len(stored) == 2 and other_tokens(stored[0], stored[1]) is not None:
                yield Problem(
                    path, f"its tokenizer ({folders[1]}) has another vocabulary than the other model's ({folders[0]})"
                )


def _vocabulary(folder: Path) -> Vocabulary | None:
    """None where there is none that can be read: the phase that loads it says what is wrong."""
    try:
        return stored_vocabulary(folder)
    except (OSError, ValueError, LookupError, AttributeError, TypeError, RecursionError):
        return None

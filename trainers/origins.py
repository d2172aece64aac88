"""What a result is made of beside its settings and inputs: data, models, the program. Imports no torch.

It is looked up before a phase starts, recorded in its result and with its unfinished work, and compared before either is
used again.
"""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from trainers.contract import Identity, Origins, PhaseType
from trainers.fingerprints import files_fingerprint, fingerprint, folder_fingerprint, hub_folder, package_version
from trainers.program import program_identity
from trainers.spec import ChatSettings, ModelRef, PhaseSpec, RewardModelRef, find_models, is_address

COMMIT = re.compile(r"[0-9a-f]{40}")


def origins_of(kind: PhaseType, spec: PhaseSpec, base_dir: Path, known: Mapping[str, str] | None = None) -> Origins:
    """The origins that a result of this spec would have now. Raises BadInput for data that is not there.

    ``known`` has the fingerprints of model sources that do not lie on this machine yet. What lies in an object store and
    is not known is left out, and what is read from the hub without a commit: the phase itself looks at it.
    """
    content = (
        dict(_data(spec, base_dir)) | dict(_models(spec, base_dir, known or {})) | dict(_templates(spec, base_dir))
    )
    return Origins(program=program_identity(kind.module), content=content)


def difference(now: Identity, then: Identity) -> str | None:
    """Why work of ``then`` is not work of ``now``, in a few words; None if it is."""
    if now.digest != then.digest:
        return "settings or inputs changed"
    changed = [path for path, mark in now.origins.content.items() if then.origins.content.get(path, mark) != mark]
    if changed:
        return f"{changed[0]} changed"
    return "the program changed" if now.origins.program != then.origins.program else None


def _data(spec: PhaseSpec, base_dir: Path) -> Iterator[tuple[str, str]]:
    for path, source in spec.data_sources():
        in_a_store = source.files is not None and is_address(source.files)
        undecided = (
            source.hub is not None and hub_folder(source.hub, base_dir) is None and not _is_commit(source.hub.revision)
        )
        if not in_a_store and not undecided:
            yield path, fingerprint(source, base_dir)


def _models(spec: PhaseSpec, base_dir: Path, known: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    refs: list[tuple[str, ModelRef | RewardModelRef]] = [*find_models(spec, ModelRef)]
    refs += find_models(spec, RewardModelRef)
    for path, ref in refs:
        if ref.source is not None and (mark := _model(ref.source, ref.revision, base_dir, known)) is not None:
            yield path, mark


def _templates(spec: PhaseSpec, base_dir: Path) -> Iterator[tuple[str, str]]:
    for path, settings in find_models(spec, ChatSettings):
        file = settings.chat_template_file(base_dir)
        if file is not None and file.is_file():
            yield f"{path}.chatTemplate", files_fingerprint([file])


def _model(source: str, revision: str | None, base_dir: Path, known: Mapping[str, str]) -> str | None:
    if source in known:
        return known[source]
    if source.startswith("package:"):
        return package_version(source.removeprefix("package:"))
    folder = base_dir / source
    if not is_address(source) and folder.is_dir():
        return folder_fingerprint(folder)
    return f"{source}@{revision}" if _is_commit(revision) else None


def _is_commit(revision: str | None) -> bool:
    """Whether a revision of the hub will always mean the same."""
    return revision is not None and COMMIT.fullmatch(revision) is not None

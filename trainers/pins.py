"""Which commits a run reads from the hub. Imports no torch.

A name such as ``org/model`` means another commit tomorrow. So a run looks it up once, and every phase of the run and
every attempt reads the same files.
"""

import os
import re
import tempfile
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import NamedTuple, TypeVar

from trainers.contract import PhaseFile
from trainers.core.hub import RepoType, hub_name, resolve
from trainers.fingerprints import hub_folder
from trainers.phase_file import set_at
from trainers.spec import HubDataset, ModelRef, PhaseSpec, RewardModelRef, find_models

S = TypeVar("S", bound=PhaseSpec)


class HubName(NamedTuple):
    path: str
    """Dotted path of the reference in the spec."""
    type: RepoType
    name: str
    revision: str | None


def pinned_spec(spec: S, file: PhaseFile, elsewhere: Collection[str] = ()) -> S:
    """The spec with a commit as the revision of everything that is read from the hub, and whole paths of folders in its place.

    ``elsewhere`` has sources of models that lie somewhere else, and are not on this machine yet. Raises BadInput for a
    name or revision that is not there, Infrastructure if the hub does not answer.
    """
    names = list(hub_names(spec, Path(file.base_dir), elsewhere))
    folders = {path: hub_folder(data, Path(file.base_dir)) for path, data in find_models(spec, HubDataset)}
    if not names and not any(folders.values()):
        return spec
    document = spec.document()
    for path, folder in folders.items():
        if folder is not None:
            set_at(document, f"{path}.name", os.path.abspath(folder))
    for found in names:
        set_at(document, f"{found.path}.revision", _pin(found, pins_folder(file)))
    return type(spec).model_validate(document)


def commits(spec: PhaseSpec, base_dir: Path) -> dict[str, str]:
    """What a pinned spec reads from the hub: `name@commit` by dotted path."""
    return {found.path: f"{found.name}@{found.revision}" for found in hub_names(spec, base_dir)}


def hub_names(spec: PhaseSpec, base_dir: Path, elsewhere: Collection[str] = ()) -> Iterator[HubName]:
    """Everything in a spec that is read from the hub; models that lie ``elsewhere`` are not."""
    models: list[tuple[str, ModelRef | RewardModelRef]] = [*find_models(spec, ModelRef)]
    models += find_models(spec, RewardModelRef)
    for path, ref in models:
        if ref.source is None or ref.source in elsewhere:
            continue
        if (name := hub_name(ref.source, base_dir)) is not None:
            yield HubName(path, "model", name, ref.revision)
    for path, data in find_models(spec, HubDataset):
        if hub_folder(data, base_dir) is None:
            yield HubName(path, "dataset", data.name, data.revision)


def pins_folder(file: PhaseFile) -> Path:
    """In the run's folder, beside its phases; it holds a file for each name, with the commit in it."""
    return Path(os.path.abspath(file.output)).parent / ".hub"


def _pin(found: HubName, folder: Path) -> str:
    """The commit that a name means in this run."""
    shown = f"{found.type}--{found.name}" + (f"@{found.revision}" if found.revision else "")
    pin = folder / re.sub(r"[^A-Za-z0-9._@-]", "--", shown)
    if not pin.exists():
        _write_once(pin, resolve(found.name, found.revision, found.type))
    return pin.read_text()


def _write_once(path: Path, text: str) -> None:
    """Create a whole file, unless another process was first: then its word counts."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=".")
    try:
        with os.fdopen(descriptor, "w") as file:
            file.write(text)
        os.link(temporary, path)
    except FileExistsError:
        return
    finally:
        os.unlink(temporary)

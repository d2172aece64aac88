"""Identity of the rows a data source yields, without reading them as rows. Imports no torch."""

import glob
import hashlib
import inspect
from pathlib import Path

from trainers.contract import BadInput, Result, canonical_json, sha256_text
from trainers.spec import DataSource, PhaseSpec


def source_files(pattern: str, base_dir: Path) -> list[Path]:
    """Files that a path or glob means, sorted; relative ones start at ``base_dir``.

    Raises BadInput if there is none.
    """
    path = base_dir / pattern
    found = [path] if path.is_file() else sorted(Path(p) for p in glob.glob(str(path), recursive=True))
    files = [p for p in found if p.is_file()]
    if not files:
        raise BadInput(f"no file matches {pattern!r} in {base_dir.resolve()}")
    return files


def fingerprint(source: DataSource, base_dir: Path) -> str:
    """SHA-256 over the files' contents; for hub data over what was asked for; for synthetic data also over the code."""
    if source.files is not None:
        return files_fingerprint(source_files(source.files, base_dir))
    code = _generator_code(source.synthetic.task) if source.synthetic else ""
    return sha256_text(canonical_json([source.document(), code]))


def same_data(result: Result, spec: PhaseSpec, base_dir: Path) -> bool:
    """Whether the data that a result was made of is still the same. Raises BadInput for data that is gone."""
    marks = {record.source: record.fingerprint for record in result.data}
    sources = {path: source for path, source in spec.data_sources() if path in marks}
    return all(fingerprint(source, base_dir) == marks[path] for path, source in sources.items())


def _generator_code(task: str) -> str:
    """Digest of a generator's source, so that mending a generator is seen as a change of its data."""
    from trainers.synthetic import TASKS

    if task not in TASKS:
        raise BadInput(f"unknown synthetic task {task!r}; known tasks: {', '.join(TASKS)}")
    return files_fingerprint([Path(inspect.getfile(TASKS[task]))])  # type: ignore[arg-type]


def files_fingerprint(files: list[Path]) -> str:
    digest = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()

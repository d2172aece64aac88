"""From a phase file to an exit status: reading, reuse, set-up, the phase, its result, its failure."""

import importlib
import json
import os
import shutil
import sys
import traceback
from collections.abc import Iterable
from contextlib import nullcontext
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import yaml
from pydantic import ValidationError

from trainers import contract
from trainers.contract import (
    BadInput,
    FailureClass,
    GateFailed,
    PhaseDir,
    PhaseError,
    PhaseFile,
    PhaseType,
    Result,
    Termination,
)
from trainers.fingerprints import same_data
from trainers.phases import phase_type
from trainers.spec import PhaseSpec, addresses

if TYPE_CHECKING:
    from trainers.core.uploads import Uploads

VERSIONED = ("torch", "transformers", "accelerate", "datasets", "peft", "safetensors")


def run_phase(type_name: str, path: Path, changes: Iterable[tuple[str, object]]) -> int:
    """Run one phase to its end. Returns the exit status of :data:`trainers.contract.FAILURES`."""
    kind = phase_type(type_name)
    digest = ""
    try:
        file = read_phase_file(path, kind, changes)
        spec = parse_spec(kind, file)
        inputs = {name: entry.digest for name, entry in file.inputs.items()}
        digest = contract.phase_digest(kind.name, spec, file.image, inputs)
        if file.remote is not None or addresses(spec):
            termination = _from_store(kind, file, spec, digest)
        else:
            termination = _finished(file, spec, digest) or _run(kind, file, spec, digest)
    except Exception as error:  # noqa: BLE001 - every way to fail ends in an exit status and a message
        return _fail(error, digest)
    _terminate(termination)
    return 0


def read_phase_file(path: Path, kind: PhaseType, changes: Iterable[tuple[str, object]]) -> PhaseFile:
    try:
        document = yaml.safe_load(path.read_text())
        for dotted, value in changes:
            _set(document["spec"], dotted.split("."), value)
        file = PhaseFile.model_validate(document)
    except (OSError, yaml.YAMLError) as error:
        raise BadInput(f"phase file {path}: {error}") from error
    except (ValidationError, KeyError, TypeError) as error:
        raise BadInput(f"phase file {path}: {_first_problem(error)}") from error
    return file if file.phase else file.model_copy(update={"phase": kind.name})


def parse_spec(kind: PhaseType, file: PhaseFile) -> Any:
    try:
        return kind.spec.model_validate(file.spec)
    except ValidationError as error:
        raise BadInput(f"{kind.name}: {_first_problem(error)}") from error


def _first_problem(error: Exception) -> str:
    if not isinstance(error, ValidationError):
        return str(error)
    first = error.errors()[0]
    place = ".".join(str(part) for part in first["loc"])
    return f"{place}: {first['msg']} (got {str(first['input'])[:80]!r})"


def _set(document: Any, path: list[str], value: object) -> None:
    for part in path[:-1]:
        document = document[int(part)] if isinstance(document, list) else document.setdefault(part, {})
    document[path[-1]] = value


def _from_store(kind: PhaseType, file: PhaseFile, spec: PhaseSpec, digest: str) -> Termination:
    """The phase, when its workspace, data or models lie on an object store."""
    from trainers.core.remote import Remote

    file = file.model_copy(update={"output": os.path.abspath(file.output)})
    remote = Remote(kind, file, spec, digest)
    here = parse_spec(kind, remote.file)
    if (result := remote.find_finished()) is not None:
        return _success(result)
    if file.remote is None and (termination := _finished(file, here, digest)) is not None:
        return termination
    remote.fetch()
    with remote.uploads() or nullcontext() as uploads:
        return _run(kind, file, here, digest, uploads)


def _finished(file: PhaseFile, spec: PhaseSpec, digest: str) -> Termination | None:
    """What an earlier run of the very same phase left, if its data has not changed since.

    Found before torch is imported: in its own directory, or anywhere in the workspace two levels above.
    """
    directory = PhaseDir(Path(file.output))
    workspace = directory.root.resolve().parent.parent
    elsewhere = (PhaseDir(path) for path in contract.find_finished(workspace, digest))
    found = next((d for d in (directory, *elsewhere) if _is_current(d, file, spec, digest)), None)
    if found is None:
        return None
    if found.root.resolve() != directory.root.resolve() and _rank() == 0:
        # The other ranks find the same result where it was, and end as well.
        contract.adopt(found.root, directory.root)
    result = found.read_result()
    assert result is not None
    print(f"{file.phase}: nothing to do, {directory.root} holds this result already")
    return _success(result)


def _is_current(directory: PhaseDir, file: PhaseFile, spec: PhaseSpec, digest: str) -> bool:
    result = directory.read_result()
    if result is None or result.digest != digest:
        return False
    if not all(artifact.intact(directory.root) for artifact in result.artifacts.values()):
        return False
    return same_data(result, spec, Path(file.base_dir))


def _run(kind: PhaseType, file: PhaseFile, spec: Any, digest: str, uploads: "Uploads | None" = None) -> Termination:
    from trainers.core.context import PhaseContext
    from trainers.core.device import device_name, peak_flops, sensors
    from trainers.core.parallel import Workers
    from trainers.meter import Meter

    directory = PhaseDir(Path(file.output))
    workers = Workers(spec.parallel)
    if workers.is_main:
        contract.open_directory(directory, digest)
    workers.barrier()
    started = datetime.now(UTC).isoformat(timespec="seconds")
    labels = {"run": file.run, "phase": file.phase, "type": kind.name, "rank": str(workers.rank)}
    meter = Meter(directory, labels, _metrics_port(workers.local_rank), spec.tracking)
    device = device_name(workers.device)
    meter.describe(device, workers.world, peak_flops(device), sensors(workers.device, labels))
    ctx = PhaseContext(file, kind, spec, directory, workers, meter, uploads)
    ctx.listen()
    meter.stage("loading")
    outcome = importlib.import_module(kind.module).main(spec, ctx)
    workers.barrier()
    # Where every node has a folder of its own, only the first process has the artifact.
    made: list[object] = [_result(ctx, outcome, digest, started)] if workers.is_main else []
    result = cast(Result, workers.gather_objects(made)[0])
    check_gates(spec, result.metrics)
    if workers.is_main:
        text = json.dumps(result.document(), indent=1)
        contract.write_atomic(directory.result, text)
    workers.barrier()
    meter.close()
    if uploads is not None:
        uploads.finish()  # may take long: no other process waits for it
    if workers.is_main:
        _drop_checkpoints(spec, directory, uploads)
    return _success(result)


def _drop_checkpoints(spec: Any, directory: PhaseDir, uploads: "Uploads | None") -> None:
    """Once the result stands; a phase without the setting has nothing worth keeping."""
    checkpoint = getattr(spec, "checkpoint", None)
    if checkpoint is None or checkpoint.keep_last == 0:
        shutil.rmtree(directory.checkpoints, ignore_errors=True)
        if uploads is not None:
            uploads.drop_checkpoints()


def _rank() -> int:
    """This process's rank, known before torch is imported."""
    return int(os.environ.get("RANK", "0"))


def _metrics_port(local_rank: int) -> int:
    """Base port plus local rank; base 0 lets the system choose."""
    base = int(os.environ.get(contract.METRICS_PORT_VARIABLE, contract.DEFAULT_METRICS_PORT))
    return base + local_rank if base else 0


def _result(ctx: Any, outcome: Any, digest: str, started: str) -> Result:
    from trainers.core.context import artifact_of

    name, artifact = artifact_of(ctx)
    identity = {"digest": digest, "artifact": artifact.digest, "data": [r.fingerprint for r in outcome.data]}
    return Result(
        run=ctx.file.run,
        phase=ctx.file.phase,
        type=ctx.type.name,
        digest=digest,
        artifact_digest=contract.sha256_text(contract.canonical_json(identity)),
        artifacts={name: artifact},
        metrics={key: float(value) for key, value in outcome.metrics.items()},
        inputs={key: entry.digest for key, entry in ctx.file.inputs.items()},
        data=tuple(outcome.data),
        settings=parse_spec(ctx.type, ctx.file).document(),  # as written: ctx.spec has local paths for addresses
        versions=_versions(),
        seed=ctx.seed,
        steps=outcome.steps,
        started_at=started,
        finished_at=datetime.now(UTC).isoformat(timespec="seconds"),
        seconds=round(ctx.meter.seconds(), 3),
    )


def _versions() -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError, version

    found = {"python": sys.version.split()[0]}
    for name in VERSIONED:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def check_gates(spec: PhaseSpec, metrics: dict[str, float]) -> None:
    """Raise GateFailed naming every metric that missed its threshold, BadInput for a metric that does not exist."""
    missed = []
    for gate in spec.gates:
        if gate.metric not in metrics:
            raise BadInput(f"gates: no metric {gate.metric!r}; this phase has {', '.join(sorted(metrics)) or 'none'}")
        value = metrics[gate.metric]
        # Written so that NaN misses both bounds.
        if gate.at_least is not None and not value >= gate.at_least:
            missed.append(f"{gate.metric} is {value:.4g}, must be at least {gate.at_least:g}")
        if gate.at_most is not None and not value <= gate.at_most:
            missed.append(f"{gate.metric} is {value:.4g}, must be at most {gate.at_most:g}")
    if missed:
        raise GateFailed("gate missed: " + "; ".join(missed))


# ---------------------------------------------------------------- endings


def _success(result: Result) -> Termination:
    return Termination(digest=result.digest, artifact_digest=result.artifact_digest, metrics=result.metrics)


def classify(error: BaseException) -> FailureClass:
    """Which failure an exception is. Matches on type names where the type lives in a heavy package."""
    if isinstance(error, PhaseError):
        return error.failure
    text = str(error).lower()
    if (
        isinstance(error, MemoryError)
        or "outofmemory" in type(error).__name__.lower()
        or "can't allocate memory" in text
    ):
        return FailureClass.OUT_OF_MEMORY
    if type(error).__name__ in ("DistBackendError", "DistNetworkError", "DistStoreError"):
        return FailureClass.INFRASTRUCTURE
    if "gloo" in text and ("connection" in text or "timed out" in text):
        return FailureClass.INFRASTRUCTURE
    if isinstance(error, OSError):
        return FailureClass.INFRASTRUCTURE
    return FailureClass.INTERNAL


def _fail(error: Exception, digest: str) -> int:
    failure = classify(error)
    lines = str(error).strip().splitlines() or [""]
    message = lines[0] if isinstance(error, PhaseError) else f"{type(error).__name__}: {lines[-1]}"
    if not isinstance(error, PhaseError):
        traceback.print_exception(error)
    print(f"{failure}: {message}", file=sys.stderr)
    _terminate(Termination(failure=failure, message=message, digest=digest))
    return contract.exit_status(failure)


def _terminate(termination: Termination) -> None:
    """Leave the termination message. Rank 0's word counts; another rank speaks only if nothing has been said yet."""
    path = os.environ.get(contract.TERMINATION_VARIABLE)
    if path is None:
        return
    target = Path(path)
    if _rank() and target.exists() and target.stat().st_size:
        return
    # A plain write: in a pod this path is a mounted file, which cannot be replaced.
    target.write_text(contract.termination_json(termination))

"""From a phase file to an exit status: reading, reuse, set-up, the phase, its result, its failure."""

import importlib
import json
import math
import os
import sys
from collections.abc import Iterable, Mapping
from contextlib import ExitStack, nullcontext
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainers import contract
from trainers.contract import (
    DataRecord,
    Diverged,
    Identity,
    Infrastructure,
    Origins,
    PhaseFile,
    PhaseType,
    Result,
    Termination,
)
from trainers.failures import fail, terminate
from trainers.files import discard, write_atomic
from trainers.gates import check_gates, check_metrics
from trainers.launched import as_launched
from trainers.lease import FolderLease, Lease, this_process
from trainers.memory_room import with_room
from trainers.origins import origins_of
from trainers.phase_dir import PhaseDir, open_directory
from trainers.phase_file import parse_spec, read_phase_file
from trainers.phases import phase_type
from trainers.pins import commits, pinned_spec
from trainers.reuse import find_finished_result, finished_here
from trainers.spec import PhaseSpec, addresses

if TYPE_CHECKING:
    from trainers.core.context import PhaseContext
    from trainers.core.parallel import Workers
    from trainers.remote.checkpoints import StoredCheckpoints
    from trainers.remote.fetch import Remote
    from trainers.remote.uploads import Uploads

VERSIONED = ("torch", "transformers", "accelerate", "datasets", "peft", "safetensors", "bitsandbytes")


def run_phase(type_name: str, path: Path, changes: Iterable[tuple[str, object]]) -> int:
    """Run one phase to its end. Returns the exit status of :data:`trainers.contract.FAILURES`."""
    kind = phase_type(type_name)
    said, folder = Termination(), None
    try:
        file = read_phase_file(path, kind, changes)
        folder = Path(file.output)
        spec = parse_spec(kind, file)
        digest = contract.digest_of(kind, file, spec)
        said = Termination(digest=digest)
        check_metrics(spec)
        result = _result_of(kind, file, spec, digest)
        said = _said(result, spec)
        check_gates(spec.gates, result.metrics)
    except Exception as error:  # noqa: BLE001 - every way to fail ends in an exit status and a message
        return fail(error, said, folder)
    terminate(said)
    return 0


def _result_of(kind: PhaseType, file: PhaseFile, spec: PhaseSpec, digest: str) -> Result:
    """The phase's result, found or made now."""
    if file.remote is not None or addresses(spec):
        return _from_store(kind, file, spec, digest)
    spec = pinned_spec(spec, file)
    identity = Identity(digest=digest, origins=origins_of(kind, spec, Path(file.base_dir)))
    return find_finished_result(file, identity) or _run(kind, file, spec, identity)


def _from_store(kind: PhaseType, file: PhaseFile, spec: PhaseSpec, digest: str) -> Result:
    """The phase, when its workspace, data or models lie on an object store."""
    from trainers.remote.fetch import Remote

    file = file.model_copy(update={"output": os.path.abspath(file.output)})
    remote = Remote(kind, file, spec, digest)
    with remote.lease or nullcontext() as lease:
        return _remote_result(kind, remote, spec, file, lease)


def _remote_result(kind: PhaseType, remote: "Remote", spec: PhaseSpec, file: PhaseFile, lease: Lease | None) -> Result:
    here = parse_spec(kind, remote.file)
    if (result := remote.find_finished()) is not None:
        return result
    if file.remote is None and (result := find_finished_result(file, remote.identity)) is not None:
        return result
    remote.fetch()
    here = pinned_spec(here, file)
    remote.keep_pins()
    with remote.uploads() or nullcontext() as uploads:
        return _run(kind, file, here, remote.identity, uploads, remote.checkpoints(uploads), lease)


def _run(
    kind: PhaseType,
    file: PhaseFile,
    spec: Any,
    identity: Identity,
    uploads: "Uploads | None" = None,
    stored: "StoredCheckpoints | None" = None,
    remote_lease: Lease | None = None,
) -> Result:
    _leave_out_unused(spec)
    from trainers.core.allocation import keep_freed_memory
    from trainers.core.context import PhaseContext
    from trainers.core.device import device_name, peak_flops, sensors
    from trainers.core.parallel import Workers
    from trainers.meter import Meter

    directory = PhaseDir(Path(file.output))
    spec = spec.model_copy(update={"parallel": as_launched(spec.parallel, os.environ)})
    workers = Workers(spec.parallel, Path(file.base_dir))
    if workers.device.type == "cpu":
        keep_freed_memory()
    labels = {"run": file.run, "phase": file.phase, "type": kind.name, "rank": str(workers.rank)}
    with ExitStack() as until_all_is_kept:
        with workers.heard_of():
            own = file.remote is None
            lease = until_all_is_kept.enter_context(_lease(file, directory, workers)) if own else remote_lease
            if own and (found := workers.from_main(lambda: finished_here(directory, identity))):
                return found  # whoever was waited for has finished it
            if workers.is_main:
                open_directory(directory, identity)
            workers.barrier()
            meter = Meter(directory, labels, _metrics_port(workers.local_rank), spec.tracking)
            until_all_is_kept.callback(meter.take_page_down)
            device = device_name(workers.device)
            meter.describe(device, workers.world, peak_flops(device), sensors(workers.device, labels))
            ctx = PhaseContext(file, kind, spec, directory, workers, meter, identity.origins, uploads, stored, lease)
            result = _carried_out(ctx, identity)
        meter.close()
        if uploads is not None:
            uploads.finish()  # may take long: no other process waits for it
        if workers.is_main:
            _drop_checkpoints(spec, directory, stored)
        return result


def _lease(file: PhaseFile, directory: PhaseDir, workers: "Workers") -> FolderLease:
    """The first process takes it, for all of them."""
    lease = FolderLease(directory.root, this_process(file.run))
    if workers.is_main:
        lease.acquire()
    lease.join(workers.from_main(lambda: lease.number))
    return lease


def _carried_out(ctx: "PhaseContext", identity: Identity) -> Result:
    """The phase's work, with its result in its folder."""
    started = datetime.now(UTC).isoformat(timespec="seconds")
    workers = ctx.workers
    ctx.listen()
    ctx.meter.stage("loading")
    ctx.spec = with_room(ctx)
    with ctx.closing:
        outcome = importlib.import_module(ctx.type.module).main(ctx.spec, ctx)
    _check_finite(outcome.metrics)
    workers.barrier()
    if workers.is_main:
        for record in outcome.data:
            print(record)
    # Where every node has a folder of its own, only the first process has the artifact.
    result = workers.from_main(lambda: _result(ctx, outcome, identity, started))
    if workers.is_main:
        text = json.dumps(result.document(), indent=1, allow_nan=False)
        write_atomic(ctx.dir.result, text)
    workers.barrier()
    return result


def _leave_out_unused(spec: Any) -> None:
    """Keep bitsandbytes from being imported where it is not used: peft does if it finds it, for seconds of every start."""
    lora = getattr(spec, "lora", None)
    if lora is None or lora.quantization is None:
        sys.modules.setdefault("bitsandbytes", None)  # type: ignore[arg-type]


def _drop_checkpoints(spec: Any, directory: PhaseDir, stored: "StoredCheckpoints | None") -> None:
    """Once the result stands; a phase without the setting has nothing worth keeping."""
    checkpoint = getattr(spec, "checkpoint", None)
    if checkpoint is None or checkpoint.keep_last == 0:
        discard(directory.checkpoints)
        if stored is not None:
            stored.drop()


def _metrics_port(local_rank: int) -> int:
    """Base port plus local rank; base 0 lets the system choose."""
    base = int(os.environ.get(contract.METRICS_PORT_VARIABLE, contract.DEFAULT_METRICS_PORT))
    return base + local_rank if base else 0


def _check_finite(metrics: Mapping[str, float]) -> None:
    """Raise Diverged if a final metric is no number: such a phase has not succeeded."""
    bad = [f"{name} is {value}" for name, value in metrics.items() if not math.isfinite(value)]
    if bad:
        raise Diverged(f"final metrics are not finite: {', '.join(bad)}")


def _check_unchanged(origins: Origins, records: Iterable[DataRecord]) -> None:
    """Raise Infrastructure if data was edited between the phase's start and its reading: an attempt anew is right."""
    for record in records:
        if origins.content.get(record.source, record.fingerprint) != record.fingerprint:
            raise Infrastructure(f"{record.source} was edited while the phase started; start it again")


def _result(ctx: Any, outcome: Any, identity: Identity, started: str) -> Result:
    from trainers.core.context import artifact_of

    _check_unchanged(identity.origins, outcome.data)
    name, artifact = artifact_of(ctx)
    made = {"identity": identity.document(), "artifact": artifact.digest}
    return Result(
        run=ctx.file.run,
        phase=ctx.file.phase,
        type=ctx.type.name,
        digest=identity.digest,
        artifact_digest=contract.sha256_text(contract.canonical_json(made)),
        artifacts={name: artifact},
        metrics={key: float(value) for key, value in outcome.metrics.items()},
        inputs={key: entry.digest for key, entry in ctx.file.inputs.items()},
        data=tuple(outcome.data),
        commits=commits(ctx.spec, ctx.base_dir),
        origins=identity.origins,
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


def _said(result: Result, spec: PhaseSpec) -> Termination:
    """What a finished phase says. Metrics that gates judge come first: those that do not fit are left out."""
    gated = {gate.metric: result.metrics[gate.metric] for gate in spec.gates if gate.metric in result.metrics}
    return Termination(
        digest=result.digest, artifact_digest=result.artifact_digest, metrics=gated | dict(result.metrics)
    )

"""Stands in for `python -m trainers TYPE --spec FILE`: the phase contract without any training.

Environment: FAKE_STEPS, FAKE_STEP_SECONDS; FAKE_FAIL_<PHASE>=CLASS ends that phase so; FAKE_CHILD=1 has a child in a session
of its own, as torchrun's workers are; FAKE_STUBBORN=1 ignores SIGTERM.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from trainers.contract import (
    Artifact,
    FailureClass,
    Identity,
    PhaseFile,
    Progress,
    Result,
    Termination,
    digest_of,
    exit_status,
    sha256_text,
    termination_json,
)
from trainers.files import write_atomic
from trainers.origins import origins_of
from trainers.phase_dir import PhaseDir
from trainers.phases import phase_type

type_name, path = sys.argv[1], Path(sys.argv[3])
file = PhaseFile.model_validate_json(path.read_text())
kind = phase_type(type_name)
spec = kind.spec.model_validate(file.spec)
digest = digest_of(kind, file, spec)
identity = Identity(digest=digest, origins=origins_of(kind, spec, Path(file.base_dir)))
directory = PhaseDir(Path(file.output))
asked = []
signal.signal(signal.SIGTERM, (lambda *_: None) if "FAKE_STUBBORN" in os.environ else (lambda *_: asked.append(1)))


def end(failure: FailureClass | None, message: str = "") -> None:
    text = termination_json(Termination(failure=failure, message=message, digest=digest))
    Path(os.environ["ALIGNMENT_TERMINATION_LOG"]).write_text(text)
    sys.exit(exit_status(failure) if failure else 0)


def main() -> None:
    print(f"{file.phase} threads {os.environ['OMP_NUM_THREADS']}", flush=True)
    halved = os.environ["ALIGNMENT_HALVINGS"]
    print(f"{file.phase} tokens {spec.parallel.micro_batch_tokens}, halved {halved} times", flush=True)
    if "FAKE_CHILD" in os.environ:
        subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
    write_atomic(directory.identity, json.dumps(identity.document()))
    if fails := os.environ.get(f"FAKE_FAIL_{file.phase.upper()}"):
        print("a line before the end", flush=True)
        end(FailureClass(fails), "the true reason")
    steps = int(os.environ.get("FAKE_STEPS", "1"))
    done = max([0, *(int(p.name.split("-")[1]) for p in directory.checkpoints.glob("step-*"))])
    print(f"{file.phase} from step {done}", flush=True)
    for step in range(done + 1, steps + 1):
        time.sleep(float(os.environ.get("FAKE_STEP_SECONDS", "0.01")))
        progress = Progress(step=step, total_steps=steps, loss=1 / step, updated_at=time.time())
        write_atomic(directory.progress, json.dumps(progress.document()))
        (directory.checkpoints / f"step-{step}").mkdir(parents=True)
        if asked:
            end(FailureClass.INTERRUPTED, "stopped")
    finish(steps)


def finish(steps: int) -> None:
    directory.model.mkdir(exist_ok=True)
    (directory.model / "config.json").write_text("{}")
    names = {"evaluation": "results.json", "package": "report.html"}
    artifact = Artifact(kind=kind.produces, path=names.get(kind.produces, "model"), digest="d")
    if kind.produces == "package":
        (directory.root / "report.html").write_text("<html></html>")
    result = Result(
        run=file.run, phase=file.phase, type=type_name, digest=digest, artifact_digest=sha256_text(digest + "artifact"),
        artifacts={kind.produces: artifact}, settings=file.spec, origins=identity.origins, steps=steps,
        inputs={n: i.digest for n, i in file.inputs.items()},
    )  # fmt: skip
    write_atomic(directory.result, json.dumps(result.document()))
    end(None)


main()

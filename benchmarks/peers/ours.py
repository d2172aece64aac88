"""A step of this project's phases, as ``python -m trainers`` takes it, with a look at the clock at the end of each."""

import importlib
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import transformers.generation.utils
import transformers.modeling_layers  # noqa: F401 - as the peer's side imports them, before a kind of work is known
import yaml
from split import OTHER, Split

from trainers import launch
from trainers.meter import Meter
from trainers.phases import phase_type

Job = dict[str, Any]
PARTS = {"rollout": "scoring", "forward_backward": "update", "optimizer": "update"}
"""What a step's parts are here; sampling and a teacher's pass are parts of these."""


def ready(job: Job) -> None:
    importlib.import_module(phase_type(_type(job)).module)


def run(job: Job) -> dict[str, Any]:
    marks: list[list[float]] = []
    parts: list[dict[str, float]] = []
    losses: list[float] = []
    log, tokens, split = Meter.log, [0], Split(job["device"])

    def timed(meter: Meter, step: int, **values: float) -> None:
        tokens[0] += job["batch"] * job["tokens"] if job["kind"] in ("samples", "ppo") else meter._tokens
        marks.append([time.process_time(), time.perf_counter(), tokens[0]])
        parts.append(split.taken())
        losses.append(values["loss"])
        log(meter, step, **values)

    Meter.log = timed  # type: ignore[method-assign]
    _watch(split, job["kind"])
    if code := launch.run_phase(_type(job), _phase_file(job), []):
        raise RuntimeError(f"{job['kind']} ended with {code}")
    return {"marks": marks, "losses": losses, "parts": parts}


def _type(job: Job) -> str:
    return {"traces": "distill", "samples": "distill"}.get(job["kind"], job["kind"])


def _watch(split: Split, kind: str) -> None:
    from trainers.core import rollouts

    part = Meter.part

    @contextmanager
    def timed(meter: Meter, name: str) -> Iterator[None]:
        with part(meter, name), split.part(PARTS.get(name, OTHER)):
            yield

    Meter.part = timed  # type: ignore[method-assign]
    split.spends(rollouts, "own_responses", "sampling")
    if kind in ("traces", "samples"):
        from trainers.phases.distill import train

        split.spends(train, "hidden_states", "scoring")  # the teacher's, of a batch


def _phase_file(job: Job) -> Path:
    output = Path(job["out"]) / "run/phase"
    shutil.rmtree(job["out"], ignore_errors=True)
    output.parent.mkdir(parents=True)
    file = output.with_name("phase.yaml")
    spec = {"seed": 0, **SPECS[job["kind"]](job)}
    file.write_text(yaml.safe_dump({"output": str(output), "inputs": {}, "spec": spec}))
    return file


def _rows(job: Job, name: str) -> list[dict[str, str]]:
    return [{"files": f"{job['folder']}/{name}.jsonl"}]


def _training(job: Job) -> dict[str, Any]:
    return {
        "batchSize": job["batch"],
        "duration": {"maxSteps": job["steps"]},
        "optim": {"lr": 1e-5, "schedule": "constant", "warmupRatio": 0.0, "maxGradNorm": 1.0, "weightDecay": 0.0},
    }


def _source(job: Job, name: str) -> dict[str, str]:
    return {"source": f"{job['folder']}/{name}"}


def _sft(job: Job) -> dict[str, Any]:
    return {**_training(job), "model": _source(job, "model"), "data": {"train": _rows(job, "sft"), "maxLength": 512}}


def _reward(job: Job) -> dict[str, Any]:
    return {**_training(job), "model": _source(job, "model"), "data": {"train": _rows(job, "pairs"), "maxLength": 512}}


def _dpo(job: Job) -> dict[str, Any]:
    return {**_training(job), "policy": _source(job, "model"), "data": {"train": _rows(job, "pairs"), "maxLength": 512}}


def _distill(job: Job, **given: Any) -> dict[str, Any]:
    models = {"teacher": _source(job, "teacher"), "student": _source(job, "model")}
    return {**_training(job), **models, "divergenceBeta": 0.5, "weighting": {"mode": "none"}, "maxLength": 512, **given}


def _traces(job: Job) -> dict[str, Any]:
    return _distill(job, traces={"files": f"{job['folder']}/traces.jsonl"}, onPolicyFraction=0.0)


def _samples(job: Job) -> dict[str, Any]:
    sampling = {"maxNewTokens": job["tokens"], "batchSize": job["batch"]}
    return _distill(job, prompts={"prompts": _rows(job, "prompts")}, onPolicyFraction=1.0, sampling=sampling)


def _ppo(job: Job) -> dict[str, Any]:
    optim = {"lr": 1e-5, "schedule": "constant", "warmupRatio": 0.0, "weightDecay": 0.0}
    return {
        "policy": _source(job, "model"), "rewardModel": _source(job, "reward"), "data": {"prompts": _rows(job, "prompts")},
        "iterations": job["steps"], "batchSize": job["batch"], "ppoEpochs": 4, "optim": optim, "criticOptim": optim,
        "sampling": {"maxNewTokens": job["tokens"], "batchSize": job["batch"]},
    }  # fmt: skip


SPECS = {"sft": _sft, "reward": _reward, "dpo": _dpo, "traces": _traces, "samples": _samples, "ppo": _ppo}

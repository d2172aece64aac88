"""Tiny models and an in-process way to run a phase. torch is imported only by what needs it."""

import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import settings

# Deadlines measure how busy the machine is; the same examples every time keep a red test red.
settings.register_profile("trainers", deadline=None, derandomize=True)
settings.load_profile("trainers")

RunPhase = Callable[..., tuple[int, Any]]
LETTERS = {"synthetic": {"task": "letters", "split": "preferences", "count": 64}}


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    if "torch" in sys.modules:
        import torch

        torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random two-layer Llama of width 32 with a word tokenizer and chat template for the `letters` task."""
    from trainers.core.scratch import scratch_model
    from trainers.spec import ScratchModel

    spec = ScratchModel.model_validate(
        {"hiddenSize": 32, "numLayers": 2, "numHeads": 4, "tokenizer": {"kind": "word", "trainOn": [LETTERS]}}
    )
    model, tokenizer = scratch_model(spec, 0, Path("."))
    directory = tmp_path_factory.mktemp("tiny-model")
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def tiny_reward_dir(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random scalar reward model with the shape and tokenizer of ``tiny_model_dir``."""
    import torch
    from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    config = AutoConfig.from_pretrained(tiny_model_dir, num_labels=1, pad_token_id=tokenizer.pad_token_id)
    torch.manual_seed(1)
    directory = tmp_path_factory.mktemp("tiny-reward")
    AutoModelForSequenceClassification.from_config(config).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def louder(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[float], Path]:
    """``louder(factor)``: the tiny model with its matrices multiplied, so that it is far from its own layers and its equals."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    def made(factor: float) -> Path:
        model = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 2:
                    parameter.mul_(factor)
        directory = tmp_path_factory.mktemp("louder")
        model.save_pretrained(directory)
        AutoTokenizer.from_pretrained(tiny_model_dir).save_pretrained(directory)
        return directory

    return made


@pytest.fixture(scope="session")
def run_phase() -> RunPhase:
    """``run_phase(type, spec, inputs, output, **file) -> (exit code, Result or None)``, in this process.

    ``inputs`` maps the phases that the spec refers to to their directories. Finished phases are looked for two levels
    above ``output``, so give every run a folder of its own: ``tmp_path / "run" / "phase"``.
    """
    from trainers import launch
    from trainers.phase_dir import PhaseDir

    def run(
        kind: str, spec: dict[str, Any], inputs: dict[str, Path] | None, output: Path, **file: Any
    ) -> tuple[int, Any]:
        path = output.with_name(f"{output.name}.phase.yaml")
        path.parent.mkdir(parents=True, exist_ok=True)
        document = {"output": str(output), "inputs": _inputs(inputs or {}), "spec": spec, **file}
        path.write_text(yaml.safe_dump(document))
        with _own_process():
            code = launch.run_phase(kind, path, [])
        result = PhaseDir(output).read_result()
        if result is not None:
            _check_metrics(kind, spec, result)
        return code, result

    return run


@pytest.fixture(scope="session")
def on_two_processes() -> Callable[[str, Path], None]:
    """``on_two_processes(type, phase file)``, told what torchrun would tell them. It fails with their output.

    torchrun itself is in test_sft_phase.py, the README's line and `make test-distributed`: each start of it imports torch thrice.
    """
    from distributed.cells import DDP, Way
    from distributed.processes import run_phases, succeed

    def run(kind: str, file: Path) -> None:
        succeed(Way(DDP), run_phases, [(kind, file)], log=file.with_suffix(".log"))

    return run


@pytest.fixture(scope="session")
def stop_after() -> Callable[[int], AbstractContextManager[None]]:
    """``with stop_after(k):`` a phase run inside gets SIGTERM when it has finished step k."""
    from distributed.acting import after_steps

    def stopping(k: int) -> AbstractContextManager[None]:
        return after_steps(lambda step, *_: os.kill(os.getpid(), signal.SIGTERM) if step == k else None)

    return stopping


def _check_metrics(kind: str, spec: dict[str, Any], result: Any) -> None:
    """Every phase that any test runs has the metrics that it declares, and no other."""
    from trainers.phases import phase_type

    declared = phase_type(kind).spec.model_validate(spec).final_metrics()
    if declared:  # an evaluation that names no models has those of its inputs
        assert set(result.metrics) <= set(declared)


def _inputs(directories: dict[str, Path]) -> dict[str, dict[str, str]]:
    from trainers.phase_dir import PhaseDir

    found = {}
    for name, directory in directories.items():
        result = PhaseDir(directory).read_result()
        assert result is not None, f"{directory} holds no finished phase"
        found[name] = {"path": str(directory), "digest": result.artifact_digest}
    return found


@contextmanager
def _own_process() -> Iterator[None]:
    """Put back what a phase leaves behind in its process: signal handlers and accelerate's state."""
    from accelerate.state import AcceleratorState, PartialState

    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    before = os.environ.get("ALIGNMENT_METRICS_PORT")
    os.environ["ALIGNMENT_METRICS_PORT"] = "0"
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        AcceleratorState._reset_state()
        PartialState._reset_state()
        if before is None:
            del os.environ["ALIGNMENT_METRICS_PORT"]
        else:
            os.environ["ALIGNMENT_METRICS_PORT"] = before

"""Which class an exception is, in the words of the libraries that raise it; and a disk that is really full."""

import errno
import json
import multiprocessing
import re
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cluster.requirements import not_here
from safetensors.torch import load_file
from torch.distributed.elastic.rendezvous import RendezvousTimeoutError

from trainers import failures
from trainers.contract import BadInput, FailureClass, Infrastructure, Termination
from trainers.failures import classify, no_room, terminate
from trainers.files import write_atomic
from trainers.phase_dir import PhaseDir

FORK = multiprocessing.get_context("fork")
OUT_OF_MEMORY = [
    "CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total capacity of 79.11 GiB",
    "CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported at some other API call",
    "CUDA driver error: out of memory",
    "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
    "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
    "NCCL error: unhandled cuda error (run with NCCL_DEBUG=INFO for details)\nCuda failure 2 'out of memory'",
    "HIP out of memory. Tried to allocate 2.00 GiB",
    "MPS backend out of memory (MPS allocated: 8.00 GB)",
    "XPU out of memory. Tried to allocate 1.00 GiB",
    "[enforce fail at alloc_cpu.cpp:117] . DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes",
    "[enforce fail at alloc_cpu.cpp:124] data. DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes.",
    "std::bad_alloc",
    "cudaErrorMemoryAllocation: out of memory",
    "Unable to allocate 7.45 GiB for an array with shape (1000000000,) and data type float64",
    "cudaHostAlloc: failed to allocate pinned memory",
]
NETWORK = [
    "[../gloo/transport/tcp/pair.cc:534] Connection closed by peer [10.0.0.7]:2713",
    "Gloo connectFullMesh failed with [../gloo/transport/tcp/pair.cc:144] no error: timed out connecting",
    "NCCL error in: ProcessGroupNCCL.cpp:1970, remote process exited or there was a network error, connection refused",
    "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:547] writev [10.0.0.7]:2713: Broken pipe",
    "The client socket has timed out after 600000ms while trying to connect to (10.0.0.7, 29500).",
]
DISK = [
    "[enforce fail at inline_container.cc:672] . unexpected pos 584448 vs 584336",
    "[enforce fail at inline_container.cc:862] . PytorchStreamWriter failed writing file data/0: file write failed",
    "Error while serializing: I/O error: No space left on device (os error 28)",
    'Error while serializing: IoError(Os { code: 122, message: "Disk quota exceeded" }) (os error 122)',
]


def raised_from(error: Exception, cause: BaseException) -> Exception:
    error.__cause__ = cause
    return error


def raised_while(error: Exception, handling: BaseException) -> Exception:
    error.__context__ = handling
    return error


class TransportError(Exception):
    """By its name: httpx's base of errors of the network."""


class ConnectTimeout(TransportError):
    pass


@pytest.mark.parametrize(
    ("error", "failure"),
    [
        *((RuntimeError(text), FailureClass.OUT_OF_MEMORY) for text in OUT_OF_MEMORY),
        *((RuntimeError(text), FailureClass.INFRASTRUCTURE) for text in [*NETWORK, *DISK]),
        (MemoryError(), FailureClass.OUT_OF_MEMORY),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), FailureClass.OUT_OF_MEMORY),
        (OSError(errno.ENOSPC, "No space left on device"), FailureClass.INFRASTRUCTURE),
        (OSError(errno.EIO, "Input/output error"), FailureClass.INFRASTRUCTURE),
        (OSError(errno.ENAMETOOLONG, "File name too long"), FailureClass.BAD_INPUT),
        (ConnectTimeout("timed out"), FailureClass.INFRASTRUCTURE),
        (RendezvousTimeoutError("no peers"), FailureClass.INFRASTRUCTURE),
        (ZeroDivisionError("x"), FailureClass.INTERNAL),
        (RuntimeError("a template that says: memory"), FailureClass.INTERNAL),
        # Wrapped, or raised while something else is cleaned up after.
        (raised_from(BadInput("x"), OSError(errno.ENOSPC, "No space left on device")), FailureClass.INFRASTRUCTURE),
        (raised_from(BadInput("x"), ValueError("y")), FailureClass.BAD_INPUT),
        (raised_from(Infrastructure("x"), ValueError("y")), FailureClass.INFRASTRUCTURE),
        (raised_from(ValueError("x"), ConnectionResetError(errno.ECONNRESET, "reset")), FailureClass.INFRASTRUCTURE),
        (raised_while(KeyError("x"), RuntimeError("CUDA out of memory")), FailureClass.OUT_OF_MEMORY),
        (raised_while(KeyError("x"), FileNotFoundError(errno.ENOENT, "gone")), FailureClass.INTERNAL),
        (BadInput("chat template: 'out of memory' is no role"), FailureClass.BAD_INPUT),
    ],
)  # fmt: skip
def test_classification(error, failure):
    assert classify(error) == failure


def test_a_model_with_a_name_that_is_too_long_is_bad_input(run_phase, tmp_path, capfd):
    spec = {"model": {"source": "x" * 300}, "data": {"train": [{"files": "rows.jsonl"}]}}
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "response": "b"}\n')
    assert run_phase("sft", spec, None, tmp_path / "run" / "sft", base_dir=str(tmp_path))[0] == 2
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.parametrize(
    ("words", "stands"),
    [
        ([(1, "OutOfMemory"), (0, "Infrastructure")], "OutOfMemory"),
        ([(0, "Infrastructure"), (1, "OutOfMemory")], "OutOfMemory"),
        ([(1, "Infrastructure"), (0, "OutOfMemory")], "OutOfMemory"),
        ([(1, "Infrastructure"), (0, "Infrastructure")], "Infrastructure of rank 1"),
        ([(0, "Infrastructure"), (1, "Infrastructure")], "Infrastructure of rank 0"),
        ([(1, "Interrupted"), (0, "Infrastructure"), (2, "BadInput")], "BadInput"),
        ([(1, "Interrupted"), (0, "Infrastructure")], "Infrastructure"),
        ([(1, "Infrastructure"), (0, None)], "success"),
        ([(0, None), (1, "Infrastructure")], "success"),
    ],
)
def test_of_several_processes_the_root_cause_has_the_last_word(words, stands, tmp_path, monkeypatch):
    """The others fail after it, with errors of the network, or are asked to stop. Of one class the first to fail is the cause."""
    monkeypatch.setenv("ALIGNMENT_TERMINATION_LOG", str(tmp_path / "word"))
    for number, failure in words:
        monkeypatch.setenv("RANK", str(number))
        terminate(Termination(failure=failure, message=f"{failure or 'success'} of rank {number}"))
    assert json.loads((tmp_path / "word").read_text())["message"].startswith(stands)


@pytest.mark.parametrize(
    ("before", "stands"),
    [("BadInput", False), ("OutOfMemory", False), ("Internal", True), ("Infrastructure", True), ("Interrupted", True)],
)
def test_a_kill_that_the_launcher_saw_explains_what_its_peers_met_after_it(before, stands, tmp_path, monkeypatch):
    monkeypatch.setenv("ALIGNMENT_TERMINATION_LOG", str(tmp_path / "word"))
    terminate(Termination(failure=FailureClass(before), message="said"))
    terminate(Termination(failure=FailureClass.INFRASTRUCTURE, message="killed", seen=True))
    assert json.loads((tmp_path / "word").read_text())["message"] == ("killed" if stands else "said")


def test_of_processes_that_fail_at_once_the_root_cause_stands(tmp_path, monkeypatch):
    """Whoever comes last has to read what was written just before it, and writes over it with less in no case."""
    word = tmp_path / "word"
    monkeypatch.setenv("ALIGNMENT_TERMINATION_LOG", str(word))
    read = failures._said_before

    def slowly(file):
        found = read(file)
        time.sleep(0.05)
        return found

    monkeypatch.setattr(failures, "_said_before", slowly)
    words = [FailureClass.BAD_INPUT, *[FailureClass.INFRASTRUCTURE] * 3]
    for _ in range(3):
        word.unlink(missing_ok=True)
        processes = [FORK.Process(target=terminate, args=(Termination(failure=failure),)) for failure in words]
        for process in processes:
            process.start()
        for process in processes:
            process.join(20)
        assert json.loads(word.read_text())["failure"] == "BadInput"


# ---------------------------------------------------------------- a full disk

SPEC = {"batchSize": 4, "duration": {"maxSteps": 8}, "checkpoint": {"everySteps": 1, "keepLast": 8}}


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system with room for three checkpoints or so."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=900k", "none", str(place)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        not_here("mounting needs root")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def test_a_full_disk_is_infrastructure_and_the_phase_goes_on_when_there_is_room(
    run_phase, tiny_model_dir, tmp_path, small_disk, monkeypatch, capfd
):
    monkeypatch.setenv("ALIGNMENT_TERMINATION_LOG", str(tmp_path / "word"))
    rows = [{"prompt": f"say {letter}", "response": f"{letter} b"} for letter in "abcdefgh"]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    spec: dict[str, Any] = {**SPEC, "model": {"source": str(tiny_model_dir)}}
    spec["data"] = {"train": [{"files": "rows.jsonl"}], "maxLength": 64}
    output = small_disk / "run" / "sft"
    code, result = run_phase("sft", spec, None, output, base_dir=str(tmp_path))
    word = json.loads((tmp_path / "word").read_text())
    assert (code, result, word["failure"]) == (75, None, "Infrastructure")
    assert re.match(rf"no space left to write [\d,]+ bytes in {output}: ", word["message"])
    assert "of 921,600 bytes are free" in word["message"]
    whole = [path for path in PhaseDir(output).checkpoints.glob("step-*") if (path / "state.json").exists()]
    assert whole, "the disk is too small for this test to say anything"

    subprocess.run(["mount", "-o", "remount,size=32m", str(small_disk)], check=True)
    capfd.readouterr()
    assert run_phase("sft", spec, None, output, base_dir=str(tmp_path))[0] == 0
    steps = [json.loads(line)["step"] for line in PhaseDir(output).metrics.read_text().splitlines()]
    assert steps == list(range(1, 9))
    undisturbed = tmp_path / "other" / "sft"
    assert run_phase("sft", spec, None, undisturbed, base_dir=str(tmp_path))[0] == 0
    ours, theirs = (load_file(PhaseDir(place).model / "model.safetensors") for place in (output, undisturbed))
    assert all((ours[name] == theirs[name]).all() for name in theirs)


def test_a_full_disk_says_how_many_bytes_were_to_be_written(small_disk):
    with pytest.raises(OSError, match="No space left") as caught:
        write_atomic(small_disk / "rows.jsonl", b"x" * 2_000_000)
    found = no_room(RuntimeError("another"), small_disk)
    assert found.startswith(f"no space left to write in {small_disk}: ")
    assert no_room(raised_from(RuntimeError("wrapped"), caught.value), small_disk).startswith(
        f"no space left to write 2,000,000 bytes in {small_disk}: 921,600 of 921,600 bytes are free"
    )

"""What is told of a vLLM that has ended: the error that the others come from. The logs are of vLLM 0.32, shortened."""

from pathlib import Path

import pytest

from trainers.core.served.log import NO_REASON, SILENCE, is_of_command, is_of_memory, last_words

REAL = Path(__file__).with_name("vllm_memory.log")
ENGINE = "(EngineCore_DP0 pid=71) ERROR 11-30 04:32:49 [core.py:1510]"
GENERIC = (
    "RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): {'EngineCore': 1}"
)
LOST = "RuntimeError: CUDA error: an illegal memory access was encountered"


def test_a_real_one_that_asked_for_more_memory_than_was_free():
    said = last_words(REAL)
    assert said.startswith("ValueError: Available memory on node 0 (21.15/23.54 GiB) on startup is less than desired")
    assert "decrease `--gpu-memory-utilization`" in said and is_of_memory(said)


@pytest.mark.parametrize(
    ("log", "told"),
    [
        # by SIGKILL, in the middle of its answers
        ("killed", NO_REASON),
        # of its worker, by SIGKILL; the engine then says "cancelled", and the server that the engine is dead
        ("lost_worker", "Worker proc VllmWorker-0 died unexpectedly (exit code: None), shutting down executor."),
        # by SIGTERM, with requests that were open
        ("stopped", "[shutdown] API server: shutting down FastAPI HTTP server / INFO:     Shutting down"),
    ],
)
def test_real_ones_that_somebody_has_ended(log, told):
    """Of whose answers the last lines are, which explain nothing."""
    said = last_words(REAL.with_name(f"vllm_{log}.log"))
    assert said.endswith(told) and "HTTP/" not in said


@pytest.mark.parametrize(
    ("lines", "told", "of_memory"),
    [
        # an engine in the server's own process group, which logs its error and then dies of it
        ([f"{ENGINE} {LOST}", f"(EngineCore_DP0 pid=71) {LOST}", f"(APIServer pid=7) {GENERIC}"], LOST, False),
        # older versions put nothing in front of a dying process's lines, and no process before the level
        (["ERROR 09-01 10:00:00 [core.py:700] torch.OutOfMemoryError: CUDA out of memory.", GENERIC],
         "torch.OutOfMemoryError: CUDA out of memory.", True),
        # settings are refused before anything is logged
        (["Traceback (most recent call last):", '  File "x.py", line 1, in y', "    raise ValueError(",
          "pydantic_core._pydantic_core.ValidationError: 1 validation error for ModelConfig",
          "  Value error, User-specified max_model_len (4096) is greater than the derived one"],
         "pydantic_core._pydantic_core.ValidationError: 1 validation error for ModelConfig Value error, User-specified "
         "max_model_len (4096) is greater than the derived one", False),
        # one error in the handling of another: what was handled is none
        ([f"{ENGINE} KeyError: 'x'", f"{ENGINE} During handling of the above exception, another exception occurred:",
          f"{ENGINE} ValueError: no such model", GENERIC], "ValueError: no such model", False),
        # a traceback that nobody died of, before the one that the program ended with
        (["ImportError: no plugin", "INFO 09-01 10:00:00 [x.py:1] on", "OSError: no such file"], "OSError: no such file", False),
        # nothing but what those say that waited
        ([f"(APIServer pid=7) {GENERIC}"], GENERIC, False),
        (["INFO 09-01 10:00:00 [x.py:1] retries upon `OSError: busy`", "WARNING 09-01 10:00:00 [x.py:1] ValueError: mild",
          "gone"], "retries upon `OSError: busy` / ValueError: mild / gone", False),
        (["usage: vllm serve [-h]", "api_server.py: error: unrecognized arguments: --x"],
         "api_server.py: error: unrecognized arguments: --x", False),
        ([f"{ENGINE} ValueError: No available memory for the cache blocks. Try increasing `gpu_memory_utilization`", GENERIC],
         "ValueError: No available memory for the cache blocks. Try increasing `gpu_memory_utilization`", True),
        ([], "it has said nothing", False),
    ],
)  # fmt: skip
def test_other_forms(tmp_path, lines, told, of_memory):
    log = tmp_path / "vllm.log"
    log.write_text("".join(f"{line}\n" for line in lines))
    assert last_words(log) == told
    assert is_of_memory(told) is of_memory


@pytest.mark.parametrize(
    ("words", "status", "of_command"),
    [
        (SILENCE, 0, True),
        (SILENCE, 1, True),
        (SILENCE, -9, False),
        (SILENCE, 137, False),  # of a shell, whose server was killed
        ("Hello", 0, True),
        ("Hello", 1, False),
        (LOST, 0, False),  # a shell that hands its log on has ended well
        (LOST, 1, False),
        ("OSError: [Errno 98] Address already in use", 1, False),
        ("/usr/bin/python3: No module named vllm", 1, True),
        ("ModuleNotFoundError: No module named 'vllm'", 1, True),
        ("ImportError: cannot import name 'x' from 'vllm' (/opt/vllm/__init__.py)", 1, True),
        ("ImportError: libcuda.so.1: cannot open shared object file: No such file or directory", 1, False),
    ],
)
def test_what_was_no_vllm(words, status, of_command):
    assert is_of_command(words, status) is of_command


def test_no_log(tmp_path):
    assert last_words(tmp_path / "vllm.log") == "it has said nothing"

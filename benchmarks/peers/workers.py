"""The sides' processes, which do a job at a time."""

import json
import os
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
OURS = f"{ROOT}{os.pathsep}{ROOT / 'benchmarks'}"


class FailedError(Exception):
    """A side has not done its job; says why."""


class Worker:
    """A process that has imported a module (see worker.py)."""

    def __init__(self, module: str, python: str, path: str, threads: int, device: str = "cpu") -> None:
        environment = os.environ | {
            "PYTHONPATH": path, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false",
            "TRL_EXPERIMENTAL_SILENCE": "1", **({"CUDA_VISIBLE_DEVICES": ""} if device == "cpu" else {}),
        }  # fmt: skip
        command = [python, str(Path(__file__).with_name("worker.py")), module]
        self.log = tempfile.TemporaryFile("w+")  # noqa: SIM115 - open as long as the process is
        self.process = subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log, text=True
        )
        self.imports = self._answer()["imports"]

    def do(self, job: dict[str, Any]) -> dict[str, Any]:
        """Raises FailedError."""
        assert self.process.stdin is not None
        with suppress(BrokenPipeError):  # it has ended, and says so by no answer
            self.process.stdin.write(json.dumps(job) + "\n")
            self.process.stdin.flush()
        return self._answer() | {"imports": self.imports}

    def close(self) -> None:
        self.process.communicate()  # the end of its input is its own
        self.log.close()

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        found: dict[str, Any] = json.loads(line) if line else {"error": "it ended"}
        if "error" in found:
            self.log.seek(0)
            raise FailedError(f"{found['error']}\n{self.log.read()[-3000:]}")
        return found


class Peers:
    """Ours, and the peers of each kind of work; processes that are started when they are wanted."""

    def __init__(self, folder: Path, threads: int, device: str) -> None:
        self.folder, self.threads, self.device = folder, threads, device
        self.workers: dict[str, Worker] = {}

    def do(self, name: str, job: dict[str, Any]) -> dict[str, Any]:
        """A side's answer: the first word of its name is whose, what follows is how. Raises FailedError."""
        whose, _, how = name.partition(" ")
        if whose not in self.workers:
            self.workers[whose] = self._worker(whose)
        try:
            return self.workers[whose].do(job | {"how": how})
        except FailedError:
            self.workers.pop(whose).close()
            raise

    def close(self) -> None:
        for worker in self.workers.values():
            worker.close()

    def _worker(self, whose: str) -> Worker:
        if not whose.startswith("trl"):
            return Worker(whose, sys.executable, OURS, self.threads, self.device)
        return Worker("theirs", str(self.folder / "bin/python"), str(self.folder / whose), self.threads, self.device)

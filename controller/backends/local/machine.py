"""What this machine has to offer, and how phases share it."""

import os
import shutil
import subprocess
from collections.abc import Collection, Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Machine:
    cores: int
    gpus: tuple[str, ...] = ()
    """As CUDA_VISIBLE_DEVICES would name them."""

    def default_jobs(self, most_procs: int) -> int:
        """Phases that may run side by side when the user has no wish."""
        return max(1, len(self.gpus) // most_procs) if self.gpus else min(2, self.cores)

    def threads(self, jobs: int, procs: int, alone: bool) -> int:
        """Threads for each process: all cores for a phase that is alone, else its share."""
        return max(1, self.cores // ((1 if alone else jobs) * procs))

    def free_gpus(self, taken: Collection[str], count: int) -> tuple[str, ...] | None:
        """GPUs that nobody has, or None if there are too few. Without GPUs the answer is empty."""
        if not self.gpus:
            return ()
        free = tuple(gpu for gpu in self.gpus if gpu not in taken)[:count]
        return free if len(free) == count else None


def this_machine(environ: Mapping[str, str]) -> Machine:
    return Machine(cores=len(os.sched_getaffinity(0)), gpus=_gpus(environ))


def _gpus(environ: Mapping[str, str]) -> tuple[str, ...]:
    """The GPUs that the user left visible, else all that nvidia-smi lists."""
    visible = environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return tuple(gpu for gpu in visible.split(",") if gpu not in ("", "-1"))
    if shutil.which("nvidia-smi") is None:
        return ()
    listing = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False)
    lines = [line for line in listing.stdout.splitlines() if line.startswith("GPU ")]
    return tuple(str(i) for i in range(len(lines))) if listing.returncode == 0 else ()

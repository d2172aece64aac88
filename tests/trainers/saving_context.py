"""As much of a phase's context as saving and going on take."""

from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from trainers.contract import Origins, PhaseFile
from trainers.core.context import PhaseContext
from trainers.phase_dir import PhaseDir
from trainers.phases import phase_type


def saving_context(workers: Any, folder: Path) -> PhaseContext:
    """A phase's own context, but for a meter that serves nobody and stands still."""
    meter: Any = SimpleNamespace(
        part=lambda name: nullcontext(),
        seconds=lambda: 1.0,
        seconds_before=0.0,
        checkpointed=lambda step: None,
        will_checkpoint=lambda step: None,
    )
    file = PhaseFile(output=str(folder))
    return PhaseContext(file, phase_type("sft"), None, PhaseDir(folder), workers, meter, Origins())

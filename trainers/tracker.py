"""Logging to Weights & Biases, which must never be the reason that a phase fails. Imports no torch.

metrics.jsonl is written in any case, so whatever goes wrong here costs one line on stderr and nothing more.
"""

import secrets
import sys
from collections.abc import Callable, Mapping
from typing import Any

from trainers.files import write_atomic
from trainers.phase_dir import PhaseDir

TIMEOUT_SECONDS = 20.0
"""How long a server may take to answer before the phase begins without it."""


class Tracker:
    """One Weights & Biases run for one phase's work: attempts at it go on with it, a rerun has a run of its own."""

    def __init__(self, project: str, name: str, directory: PhaseDir, settings: Mapping[str, Any]) -> None:
        self._run: Any = None
        self._try(lambda: self._begin(project, name, directory, settings))

    def log(self, step: int, values: Mapping[str, float]) -> None:
        if self._run is not None:
            self._try(lambda: self._run.log(dict(values), step=step))

    def finish(self) -> None:
        if self._run is not None:
            self._try(self._run.finish)

    def _begin(self, project: str, name: str, directory: PhaseDir, settings: Mapping[str, Any]) -> None:
        import wandb

        self._run = wandb.init(
            project=project,
            name=name,
            id=_run_id(directory),
            resume="allow",
            config=dict(settings),
            dir=directory.root,
            settings=wandb.Settings(init_timeout=TIMEOUT_SECONDS),
        )

    def _try(self, call: Callable[[], object]) -> None:
        """Its errors are of many kinds (no package, no key, no network, a refused project), and none of them matters here."""
        try:
            call()
        except Exception as error:  # noqa: BLE001
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            print(f"Weights & Biases: {reason}; metrics go to metrics.jsonl only", file=sys.stderr)
            self._run = None


def _run_id(directory: PhaseDir) -> str:
    """Kept with the work, so it goes where the work goes: on after a stop, to the history when an edit displaces it."""
    if not directory.wandb.exists():
        write_atomic(directory.wandb, secrets.token_hex(8))
    return directory.wandb.read_text()

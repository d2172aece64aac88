"""Unfinished work on disk: ``checkpoints/step-N/``, written whole or not at all.

A checkpoint holds trained weights, optimizer state (both safetensors) and a small JSON state. There is no RNG state:
everything random is a function of the seed and the step. All of it is read and checked before any of it is used, so a
damaged checkpoint, of whatever kind, leaves nothing half loaded.
"""

import json
import math
import re
import shutil
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.distributed.tensor import DTensor, distribute_tensor

from trainers.contract import Diverged, Infrastructure
from trainers.core.context import PhaseContext
from trainers.core.sharding import whole
from trainers.core.tensors import DamagedError, read_tensors, write_tensors
from trainers.core.trainee import Trainee
from trainers.files import new_directory
from trainers.spec import Checkpoint

NAME = re.compile(r"step-(\d+)$")


@dataclass(frozen=True)
class Saved:
    """A checkpoint in memory."""

    step: int
    tensors: dict[str, dict[str, torch.Tensor]]
    """By trainee, and by the names of :class:`trainers.core.engines.engine.Engine`."""
    state: dict[str, Any]
    seconds: float


class Checkpoints:
    """When to save, what to keep, where to go on from."""

    def __init__(self, ctx: PhaseContext, spec: Checkpoint, trainees: Mapping[str, Trainee]) -> None:
        self.ctx = ctx
        self.spec = spec
        self.trainees = dict(trainees)
        self.state: dict[str, Any] = {}
        """JSON state that goes along: adaptive coefficients, evaluation history."""
        self._saved_at = time.monotonic()
        self._saved_step = -1

    def restore(self) -> int:
        """Load the newest whole checkpoint. Returns the number of finished steps, 0 without one."""
        for step in reversed(self._shared_steps()):
            saved = self._usable(step)
            if not self.ctx.workers.any(saved is None) and saved is not None:
                self._load(saved)
                break
        newest = max(self._saved_step, 0)
        self.ctx.meter.will_checkpoint(newest)
        return newest

    def _shared_steps(self) -> list[int]:
        """Steps whose checkpoints all processes have: nodes with folders of their own might have fetched different ones."""
        mine = [step for step, _ in steps_in(self.ctx.dir.checkpoints)]
        found = self.ctx.workers.gather_objects(list(mine))
        return [step for step in mine if found.count(step) == self.ctx.workers.world]

    def _usable(self, step: int) -> Saved | None:
        path = self.ctx.dir.checkpoints / f"step-{step}"
        try:
            return self._read(step, path)
        except DamagedError as error:
            # Names are given to whole checkpoints only, so something damaged it afterwards: take the one before.
            print(f"checkpoint {path} cannot be used ({error}), trying an older one", file=sys.stderr)
            return None

    def _read(self, step: int, path: Path) -> Saved:
        """Everything, checked against what it will be loaded into. Raises DamagedError."""
        saved = Saved(
            step,
            {name: read_tensors(path / f"{name}.safetensors") for name in self.trainees},
            *_read_state(path / "state.json", step),
        )
        try:
            for name, trainee in self.trainees.items():
                trainee.check_saved({key: tensor.shape for key, tensor in saved.tensors[name].items()})
        except ValueError as error:
            raise DamagedError(str(error)) from error
        if "best" in saved.state:
            self._read_best()  # what it says of the best weights is of no use without these
        return saved

    def _load(self, saved: Saved) -> None:
        for name, trainee in self.trainees.items():
            _take(trainee, saved.tensors[name])
        self.state, self._saved_step = saved.state, saved.step
        self.ctx.meter.seconds_before = saved.seconds

    def after_step(self, step: int, total_steps: int, epoch_end: bool = False) -> None:
        """Call after every finished step: saves when it is time, and before stopping when asked to stop."""
        stop = self.ctx.stop_asked
        if stop or self._due(step, epoch_end) or step == total_steps:
            self.save(step)
        if stop and step < total_steps:
            self.ctx.stop(f"stopped after step {step} of {total_steps}; the checkpoint is saved")

    def _due(self, step: int, epoch_end: bool) -> bool:
        spec = self.spec
        if spec.every_steps is not None and step % spec.every_steps == 0:
            return True
        if spec.every_epoch and epoch_end:
            return True
        late = spec.every_seconds is not None and time.monotonic() - self._saved_at > spec.every_seconds
        return self.ctx.workers.any(late)

    def save(self, step: int) -> None:
        if step == self._saved_step:
            return
        with self.ctx.meter.part("checkpoint"):
            self._write(step)
            if self.ctx.workers.is_main:
                # Waits until the checkpoint before is uploaded: only then may it be pruned.
                self.ctx.keep(self.ctx.dir.checkpoints / f"step-{step}", newest=self.spec.keep_last)
                self._prune()
            self.ctx.workers.barrier()
        self._saved_at, self._saved_step = time.monotonic(), step
        self.ctx.meter.checkpointed(step)

    def _write(self, step: int) -> None:
        tensors = {name: self._whole(trainee) for name, trainee in self.trainees.items()}
        if not self.ctx.workers.is_main:
            return
        with new_directory(self.ctx.dir.checkpoints / f"step-{step}") as folder:
            for name, found in tensors.items():
                write_tensors(folder / f"{name}.safetensors", found)
            state = {"step": step, "seconds": self.ctx.meter.seconds(), "state": self.state}
            (folder / "state.json").write_text(json.dumps(state))

    def _whole(self, trainee: Trainee, moments: bool = True) -> dict[str, torch.Tensor]:
        """A trainee's state where it is written; all processes take part, one tensor after the other."""
        writes = self.ctx.writes_for_others
        found = ((name, whole(tensor)) for name, tensor in trainee.engine.saved(moments))
        return {name: tensor for name, tensor in found if writes}

    def _prune(self) -> None:
        """Keep the newest; leftovers of killed writers go too."""
        root = self.ctx.dir.checkpoints
        for _, path in steps_in(root)[: -max(1, self.spec.keep_last)]:
            shutil.rmtree(path)
        for leftover in root.glob(".step-*"):
            shutil.rmtree(leftover)

    def keep_best(self, name: str, value: float, higher_is_better: bool) -> None:
        """Remember the weights of trainee ``name`` if ``value`` is the best so far. Raises Diverged if it is no number."""
        if not math.isfinite(value):
            raise Diverged(f"the held-out score is {value}; try a lower optim.lr")
        best = self.state.get("best")
        if best is not None and (value <= best if higher_is_better else value >= best):
            return
        self.state["best"] = value
        tensors = self._whole(self.trainees[name], moments=False)
        if self.ctx.writes_for_others:
            with new_directory(self._best) as folder:
                write_tensors(folder / f"{name}.safetensors", tensors)
                self.ctx.before_replacing()
            self.ctx.keep(self._best / f"{name}.safetensors")
        self.ctx.workers.barrier()

    def load_best(self, name: str) -> None:
        """Raises Infrastructure when the best weights were damaged: started again, the phase finds them anew."""
        try:
            tensors = self._read_best()[name]
            self.trainees[name].check_saved({key: tensor.shape for key, tensor in tensors.items()})
            _take(self.trainees[name], tensors)
        except (DamagedError, KeyError, ValueError) as error:
            raise Infrastructure(f"the best weights in {self._best} cannot be read: {error}") from error

    @property
    def _best(self) -> Path:
        return self.ctx.dir.checkpoints / "best"

    def _read_best(self) -> dict[str, dict[str, torch.Tensor]]:
        """The best weights by trainee. Raises DamagedError."""
        files = sorted(self._best.glob("*.safetensors"))
        if not files:
            raise DamagedError(f"{self._best} holds no weights")
        return {file.stem: read_tensors(file) for file in files}


def _take(trainee: Trainee, tensors: Mapping[str, torch.Tensor]) -> None:
    """Let a trainee go on from a whole state, of which every process has all."""

    def fill(targets: dict[str, torch.Tensor]) -> None:
        for name, target in targets.items():
            found = tensors[name].to(device=target.device, dtype=target.dtype)
            if isinstance(target, DTensor):
                found = distribute_tensor(found, target.device_mesh, target.placements)
            target.copy_(found)

    trainee.engine.restore(fill, tensors)


def _read_state(path: Path, step: int) -> tuple[dict[str, Any], float]:
    """The JSON state and the seconds of work so far. Raises DamagedError."""
    try:
        saved = json.loads(path.read_text())
        if saved["step"] != step:
            raise DamagedError(f"{path.name} is of step {saved['step']}")
        return dict(saved["state"]), float(saved["seconds"])
    except FileNotFoundError as error:
        raise DamagedError(f"{path.name} is missing") from error
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise DamagedError(f"{path.name}: {error}") from error


def steps_in(root: Path) -> list[tuple[int, Path]]:
    """Whole checkpoints, oldest first. Names are given last, so a directory with the right name is whole."""
    if not root.is_dir():
        return []
    found = [(int(m.group(1)), path) for path in root.iterdir() if (m := NAME.match(path.name)) and path.is_dir()]
    return sorted(found)

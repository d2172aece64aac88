"""Unfinished work on disk: ``checkpoints/step-N/``, written whole or not at all.

A checkpoint holds trained weights (safetensors), optimizer state (tensors, loaded with ``weights_only``) and a small
JSON state. There is no RNG state: everything random is a function of the seed and the step.
"""

import json
import re
import shutil
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from trainers.core.context import PhaseContext
from trainers.core.trainee import Trainee
from trainers.files import commit_directory
from trainers.spec import Checkpoint

NAME = re.compile(r"step-(\d+)$")


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
        found = (step for step in reversed(self._shared_steps()) if not self.ctx.workers.any(not self._loads(step)))
        newest = next(found, 0)
        self.ctx.meter.will_checkpoint(newest)
        return newest

    def _shared_steps(self) -> list[int]:
        """Steps whose checkpoints all processes have: nodes with folders of their own might have fetched different ones."""
        mine = [step for step, _ in steps_in(self.ctx.dir.checkpoints)]
        found = self.ctx.workers.gather_objects(list(mine))
        return [step for step in mine if found.count(step) == self.ctx.workers.world]

    def _loads(self, step: int) -> bool:
        path = self.ctx.dir.checkpoints / f"step-{step}"
        try:
            self._load(step, path)
        except (SafetensorError, OSError, ValueError, KeyError, RuntimeError) as error:
            # Names are given to whole checkpoints only, so something damaged it afterwards: take the one before.
            print(f"checkpoint {path} cannot be read ({error}), trying an older one", file=sys.stderr)
            return False
        return True

    def _load(self, step: int, path: Path) -> None:
        saved = json.loads((path / "state.json").read_text())
        for name, trainee in self.trainees.items():
            trainee.load_weights(load_file(path / f"{name}.safetensors", device=str(trainee.workers.device)))
            device = trainee.workers.device
            trainee.load_optimizer_state(
                torch.load(path / f"{name}.optimizer.pt", map_location=device, weights_only=True)
            )
        self.state = saved["state"]
        self.ctx.meter.seconds_before = saved["seconds"]
        self._saved_step = step

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
            if self.ctx.workers.is_main:
                self._write(step)
                # Waits until the checkpoint before is uploaded: only then may it be pruned.
                self.ctx.keep(self.ctx.dir.checkpoints / f"step-{step}", newest=self.spec.keep_last)
                self._prune()
            self.ctx.workers.barrier()
        self._saved_at, self._saved_step = time.monotonic(), step
        self.ctx.meter.checkpointed(step)

    def _write(self, step: int) -> None:
        root = self.ctx.dir.checkpoints
        temporary = root / f".step-{step}.tmp"
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        for name, trainee in self.trainees.items():
            weights = {key: tensor.contiguous() for key, tensor in trainee.trained_weights().items()}
            save_file(weights, temporary / f"{name}.safetensors")
            torch.save(trainee.optimizer_state(), temporary / f"{name}.optimizer.pt")
        state = {"step": step, "seconds": self.ctx.meter.seconds(), "state": self.state}
        (temporary / "state.json").write_text(json.dumps(state))
        commit_directory(temporary, root / f"step-{step}")

    def _prune(self) -> None:
        """Keep the newest; leftovers of killed writers go too."""
        root = self.ctx.dir.checkpoints
        for _, path in steps_in(root)[: -max(1, self.spec.keep_last)]:
            shutil.rmtree(path)
        for leftover in root.glob(".step-*"):
            shutil.rmtree(leftover)

    def keep_best(self, name: str, value: float, higher_is_better: bool) -> None:
        """Remember the weights of trainee ``name`` if ``value`` is the best so far."""
        best = self.state.get("best")
        if best is not None and (value <= best if higher_is_better else value >= best):
            return
        self.state["best"] = value
        if self.ctx.writes_for_others:
            temporary = self.ctx.dir.checkpoints / ".best.tmp"
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
            weights = {key: tensor.contiguous() for key, tensor in self.trainees[name].trained_weights().items()}
            save_file(weights, temporary / f"{name}.safetensors")
            self.ctx.before_replacing()
            commit_directory(temporary, self.ctx.dir.checkpoints / "best")
            self.ctx.keep(self.ctx.dir.checkpoints / "best" / f"{name}.safetensors")
        self.ctx.workers.barrier()

    def load_best(self, name: str) -> None:
        trainee = self.trainees[name]
        path = self.ctx.dir.checkpoints / "best" / f"{name}.safetensors"
        trainee.load_weights(load_file(path, device=str(trainee.workers.device)))


def steps_in(root: Path) -> list[tuple[int, Path]]:
    """Whole checkpoints, oldest first. Names are given last, so a directory with the right name is whole."""
    if not root.is_dir():
        return []
    found = [(int(m.group(1)), path) for path in root.iterdir() if (m := NAME.match(path.name))]
    return sorted(found)

"""Unfinished work on disk: when it is saved, what is kept, where to go on from.

A checkpoint, ``checkpoints/step-N/``, is written whole or not at all, and holds trained weights, optimizer state and a small
JSON state. There is no RNG state: everything random is a function of the seed and the step. All of it is read and
checked, by all processes together, before any of it is used, so a damaged one, of whatever kind, leaves nothing half
loaded. Names and shards say nothing of the strategy: any number of processes can go on with it.
"""

import math
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch

from trainers.contract import Diverged, Infrastructure
from trainers.core.context import PhaseContext
from trainers.core.engines.engine import Fill
from trainers.core.saving.schedule import Clock
from trainers.core.saving.staging import Staging
from trainers.core.saving.storage import Folder, State, read_folder, read_state
from trainers.core.saving.writer import Writer
from trainers.core.tensors import DamagedError
from trainers.core.trainee import Trainee
from trainers.files import discard
from trainers.spec import Checkpoint

NAME = re.compile(r"step-(\d+)$")
BEST = re.compile(r"best-(\d+)$")
ON_ITS_WAY = "on-its-way/"


class OnItsWay(Protocol):
    """What coming steps will use and no weights can make again, such as samples by weights that are gone."""

    def saved(self, step: int) -> Iterator[tuple[str, torch.Tensor]]:
        """After so many finished steps: whole tensors, the same on all ranks."""
        ...

    def restore(self, step: int, fill: Fill, shapes: Mapping[str, torch.Size]) -> None: ...


class Checkpoints:
    """Saving is staged, then written in the background; what fails there is raised by the next call, in all processes alike."""

    def __init__(
        self, ctx: PhaseContext, spec: Checkpoint, trainees: Mapping[str, Trainee], on_its_way: OnItsWay | None = None
    ) -> None:
        self.ctx = ctx
        self.on_its_way = on_its_way
        self.spec = spec
        self.trainees = dict(trainees)
        self.state: dict[str, Any] = {}
        """JSON state that goes along: adaptive coefficients, evaluation history."""
        self._writer = Writer(ctx)
        self._memory = {kind: Staging(ctx.workers.rank, ctx.workers.world) for kind in ("all", "best")}
        self._written: dict[str, Future[float]] = {}
        """What was written in the background last, or still is, by the memory it is written from."""
        self._clock = Clock(spec)
        self._saved_step = -1
        self._unusable: set[int] = set()

    # -- going on

    def restore(self) -> int:
        """Load the newest whole checkpoint. Returns the number of finished steps, 0 without one."""
        for step in reversed(self._shared_steps()):
            saved = self._usable(step)
            if not self.ctx.workers.any(saved is None) and saved is not None:
                self._load(saved)
                break
            self._unusable.add(step)
        newest = max(self._saved_step, 0)
        self.ctx.meter.will_checkpoint(newest)
        return newest

    def _shared_steps(self) -> list[int]:
        """Steps whose checkpoints all processes have: nodes with folders of their own might have fetched different ones."""
        mine = [step for step, _ in steps_in(self._root)]
        found = self.ctx.workers.gather_objects(list(mine))
        return [step for step in mine if found.count(step) == self.ctx.workers.world]

    def _usable(self, step: int) -> Folder | None:
        path = self._root / f"step-{step}"
        try:
            return self._checked(step, path)
        except DamagedError as error:
            # Names are given to whole checkpoints only, so something damaged it afterwards: take the one before.
            print(f"checkpoint {path} cannot be used ({error}), trying an older one", file=sys.stderr)
            return None

    def _checked(self, step: int, path: Path) -> Folder:
        """What all processes together have checked, each a share of it. Raises DamagedError."""
        saved = read_folder(path)
        if saved.state.step != step:
            raise DamagedError(f"state.json is of step {saved.state.step}")
        self._check(saved, self.trainees)
        if saved.state.needs is not None:
            self._read_best(saved.state.needs)  # what it says of the best weights is of no use without these
        return saved

    def _check(self, saved: Folder, trainees: Mapping[str, Trainee]) -> None:
        try:
            for name, trainee in trainees.items():
                trainee.check_saved(saved.index.shapes(f"{name}/"))
        except ValueError as error:
            raise DamagedError(str(error)) from error
        saved.check(*self._share)

    def _load(self, saved: Folder) -> None:
        for name, trainee in self.trainees.items():
            _take(trainee, saved, name)
        if self.on_its_way is not None:
            shapes = saved.index.shapes(ON_ITS_WAY)
            self.on_its_way.restore(saved.state.step, partial(saved.fill, ON_ITS_WAY), shapes)
        self.state, self._saved_step = dict(saved.state.state), saved.state.step
        self.ctx.meter.seconds_before = saved.state.seconds

    # -- saving

    def after_step(self, step: int, total_steps: int, epoch_end: bool = False) -> None:
        """Call after every finished step: saves when it is time, and before stopping when asked to stop."""
        done = step == total_steps
        asked = self.ctx.workers.any(self.ctx.stop_signal is not None or self._failed or self._late)
        if not (asked or done or self._due(step, epoch_end)):
            return
        if self.ctx.workers.any(self._failed):
            self.wait()
        self.save(step)
        if (stop := self.ctx.stop_asked) or done:
            self.wait()
        if stop and not done:
            self.ctx.stop(f"stopped after step {step} of {total_steps}; the checkpoint is saved")

    @property
    def _failed(self) -> bool:
        return any(future.done() and future.exception() is not None for future in self._written.values())

    @property
    def _late(self) -> bool:
        last = self._written.get("all")
        if last is None:
            return self._clock.is_due(0.0)
        return self._clock.is_due(last.result() if last.done() and not last.exception() else None)

    def _due(self, step: int, epoch_end: bool) -> bool:
        spec = self.spec
        return (spec.every_steps is not None and step % spec.every_steps == 0) or (spec.every_epoch and epoch_end)

    def save(self, step: int) -> None:
        """Returns as soon as training may go on. Raises what the checkpoint before failed with."""
        if step == self._saved_step:
            return
        coming = self._coming(step)
        begin = time.monotonic()
        with self.ctx.meter.part("checkpoint"):
            state = State(step=step, seconds=self.ctx.meter.seconds(), state=dict(self.state), needs=self._best_name)
            self._unusable.discard(step)
            self._write("all", f"step-{step}", self._tensors(coming), state, partial(self._saved, step))
        self._clock.saved(time.monotonic() - begin)
        self._saved_step = step

    def wait(self) -> None:
        """Until all that was saved is on disk, and in the store. Raises what failed."""
        with self.ctx.meter.part("checkpoint"):
            for written in self._written.values():
                written.result()

    def _write(
        self, kind: str, name: str, state: Iterator[tuple[str, torch.Tensor]], about: State, after: Callable[[], None]
    ) -> None:
        if kind in self._written:
            self._written[kind].result()
        staged = self._memory[kind].stage(state)
        self._written[kind] = self._writer.write(self._root / name, staged, about, after)

    def _coming(self, step: int) -> dict[str, torch.Tensor]:
        """What coming steps will use. The next one would have waited for it, so it is no cost of saving."""
        if self.on_its_way is None:
            return {}
        with self.ctx.meter.part("rollout"):
            return {f"{ON_ITS_WAY}{key}": tensor for key, tensor in self.on_its_way.saved(step)}

    def _tensors(self, coming: Mapping[str, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
        for name, trainee in self.trainees.items():
            yield from ((f"{name}/{key}", tensor) for key, tensor in trainee.engine.saved())
        yield from coming.items()

    def _saved(self, step: int) -> None:
        """In the background: a checkpoint is whole."""
        if self.ctx.writes_for_others:
            self._prune()
        if self.ctx.stored is not None and self.ctx.workers.is_main:
            self.ctx.stored.prune(self.spec.keep_last)
        self.ctx.meter.checkpointed(step)

    def _prune(self) -> None:
        """Keep the newest whole ones and the best weights that they need; leftovers of killed writers go too."""
        steps = steps_in(self._root)
        whole = [step for step, _ in steps if step not in self._unusable]
        kept = whole[-max(1, self.spec.keep_last) :]
        for step, path in steps:
            if step not in kept and step < whole[-1]:
                discard(path)
        needed = {read_state(self._root / f"step-{step}").needs for step in kept}
        for _, path in _folders(self._root, BEST)[:-1]:  # the newest may be one that no checkpoint knows of yet
            if path.name not in needed:
                discard(path)
        for leftover in self._root.glob(".*-*"):
            discard(leftover)

    # -- the best weights

    def keep_best(self, name: str, value: float, higher_is_better: bool) -> None:
        """Remember the weights of trainee ``name`` if ``value`` is the best so far. Raises Diverged if it is no number."""
        if not math.isfinite(value):
            raise Diverged(f"the held-out score is {value}; try a lower optim.lr")
        best = self.state.get("best")
        if best is not None and (value <= best if higher_is_better else value >= best):
            return
        # Another name each time: a checkpoint from before still has what it needs.
        self.state |= {"best": value, "bestNumber": self.state.get("bestNumber", 0) + 1}
        weights = ((f"{name}/{key}", tensor) for key, tensor in self.trainees[name].engine.saved(moments=False))
        state = State(step=0, seconds=self.ctx.meter.seconds(), state={})
        with self.ctx.meter.part("checkpoint"):
            self._write("best", str(self._best_name), weights, state, lambda: None)

    def load_best(self, name: str) -> None:
        """Raises Infrastructure when the best weights were damaged: started again, the phase finds them anew."""
        self.wait()
        assert self._best_name is not None
        if self.ctx.stored is not None:  # other nodes hold the other shards
            self.ctx.stored.fetch(self._root / self._best_name)
        self.ctx.workers.barrier()
        problem = ""
        try:
            best = self._read_best(self._best_name, name)
        except DamagedError as error:
            problem = f"the best weights in {self._root / self._best_name} cannot be read: {error}"
        found = [text for text in self.ctx.workers.gather_objects([problem]) if text]
        if found:
            raise Infrastructure(str(found[0]))
        _take(self.trainees[name], best, name)

    @property
    def _best_name(self) -> str | None:
        return f"best-{self.state['bestNumber']}" if "bestNumber" in self.state else None

    def _read_best(self, folder: str, name: str | None = None) -> Folder:
        """The best weights, checked; of trainee ``name``, if only one will do. Raises DamagedError."""
        best = read_folder(self._root / folder)
        trainees = {found: trainee for found, trainee in self.trainees.items() if best.index.shapes(f"{found}/")}
        if (name is not None and name not in trainees) or not trainees:
            raise DamagedError(f"{folder} holds no weights")
        self._check(best, trainees)
        return best

    @property
    def _share(self) -> tuple[int, int]:
        """Which share of the files this process checks, of how many: those who see the same folder divide it up."""
        workers = self.ctx.workers
        if self.ctx.file.remote is None:
            return workers.rank, workers.world
        return workers.local_rank, int(os.environ.get("LOCAL_WORLD_SIZE", "1"))

    @property
    def _root(self) -> Path:
        return self.ctx.dir.checkpoints


def _take(trainee: Trainee, saved: Folder, name: str) -> None:
    prefix = f"{name}/"
    trainee.engine.restore(partial(saved.fill, prefix), saved.index.shapes(prefix))


def _folders(root: Path, name: re.Pattern[str]) -> list[tuple[int, Path]]:
    """Folders of such a name, by their number. Names are given last, so a directory with the right name is whole."""
    if not root.is_dir():
        return []
    found = [(int(m.group(1)), path) for path in root.iterdir() if (m := name.match(path.name)) and path.is_dir()]
    return sorted(found)


def steps_in(root: Path) -> list[tuple[int, Path]]:
    """Whole checkpoints, oldest first."""
    return _folders(root, NAME)

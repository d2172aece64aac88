"""The driver of local runs: observe, decide, save, act in a loop until the run ends or someone says stop."""

import asyncio
import enum
import signal
from collections.abc import Collection
from datetime import UTC, datetime
from pathlib import Path
from typing import Protocol

from controller import runs_folder
from controller.api import meta
from controller.api.run import AlignmentRun
from controller.api.status import RunStatus
from controller.backends.base import act
from controller.backends.local.backend import LocalBackend
from controller.plan.decide import Decision, decide, is_terminal
from trainers.failures import is_disk_full, no_room

POLL_SECONDS = 0.2
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Outcome(enum.Enum):
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    SUSPENDED = "suspended"
    INTERRUPTED = "interrupted"

    @property
    def exit_status(self) -> int:
        return {Outcome.SUCCEEDED: 0, Outcome.INTERRUPTED: 130}.get(self, 1)


class Display(Protocol):
    """Whoever shows the run."""

    def show(self, status: RunStatus) -> None: ...

    def say(self, text: str) -> None: ...


class Runner:
    def __init__(
        self,
        run: AlignmentRun,
        backend: LocalBackend,
        root: Path,
        display: Display,
        only: Collection[str] | None = None,
    ) -> None:
        self.run = run
        self.backend = backend
        self.root = root
        self.display = display
        self.only = only
        self._stops = 0
        self._full = False
        self._woken = asyncio.Event()

    async def drive(self) -> Outcome:
        """Reconcile until the run ends. Whatever happens, no process is left behind."""
        loop = asyncio.get_running_loop()
        for number in STOP_SIGNALS:
            loop.add_signal_handler(number, self._on_stop)
        try:
            return await self._loop()
        finally:
            self.backend.kill_all()
            for number in STOP_SIGNALS:
                loop.remove_signal_handler(number)

    async def _loop(self) -> Outcome:
        while not self._stops:
            decision = await self._reconciled()
            if decision is None:
                await self._sleep()
                continue
            self.run = self.run.model_copy(update={"status": decision.status})
            self.display.show(decision.status)
            if is_terminal(decision.status):
                return Outcome.SUCCEEDED if decision.status.is_true(meta.SUCCEEDED) else Outcome.FAILED
            if decision.status.is_true(meta.SUSPENDED) and not self.backend.live_phases:
                return Outcome.SUSPENDED
            await self._sleep()
        await self._wind_down()
        return Outcome.INTERRUPTED

    async def _reconciled(self) -> Decision | None:
        """One turn; None if there is no room to write what it comes to, which the next one tries again."""
        try:
            decision = await self._turn()
        except OSError as error:
            if not is_disk_full(error):
                raise
            if not self._full:
                self.display.say(f"{no_room(error, self.root)}; the run goes on when there is room")
            self._full = True
            return None
        self._full = False
        return decision

    async def _turn(self) -> Decision:
        """The status is saved before anything is done: a crash in between asks again, and never forgets a failure."""
        observed = await self.backend.observe(self.run)
        decision = decide(self.run, observed, datetime.now(UTC), self.only)
        if decision.status != self.run.status:
            runs_folder.write_status(self.root, self.run.name, decision.status)
        await act(self.backend, self.run, decision.actions, observed)
        return decision

    async def _sleep(self) -> None:
        try:
            await asyncio.wait_for(self._woken.wait(), POLL_SECONDS)
        except TimeoutError:
            return

    def _on_stop(self) -> None:
        self._stops += 1
        self._woken.set()
        if self._stops > 1:
            self.backend.kill_all()

    async def _wind_down(self) -> None:
        """Let the phases save. A second signal, or the end of the grace, kills them."""
        if names := self.backend.live_phases:
            self.display.say(f"stopping {', '.join(names)}: unfinished work is being saved (again to kill)")
        while self.backend.live_phases:
            await self.backend.stop_all(self.run)
            await asyncio.sleep(POLL_SECONDS)

"""Configs of the models that runs name, fetched beside the work: nothing waits for them, and nothing fails without them."""

import asyncio
import logging
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from controller.api.run import AlignmentRun
from controller.memory import Key
from controller.plan.shapes import Configs, sources
from trainers.sizing.configs import Source, read_configs

logger = logging.getLogger(__name__)

RETRY_SECONDS = 1800.0
"""Before a source whose config could not be had is asked for again."""
KEPT = 1000
"""Sources that are remembered."""
NOWHERE = Path("/nonexistent")
"""Relative paths of models mean folders in the workspace, which the operator never sees."""


class ModelConfigs:
    def __init__(
        self,
        look_again: Callable[[Key], None],
        read: Callable[[set[Source], Path], Configs] = read_configs,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.look_again = look_again
        self.read = read
        self.clock = clock
        self._known: dict[Source, Mapping[str, Any]] = {}
        self._asked: dict[Source, float] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    def of(self, key: Key, run: AlignmentRun) -> Configs:
        """Those that are known by now. The others are asked for, and the run is looked at again when one has come."""
        wanted = sources(run)
        due = {source for source in wanted - self._known.keys() if self._is_due(source)}
        if due:
            self._forget()
            self._asked |= dict.fromkeys(due, self.clock())
            task = asyncio.get_running_loop().create_task(self._fetch(key, due))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        return {source: self._known[source] for source in wanted & self._known.keys()}

    def _is_due(self, source: Source) -> bool:
        asked = self._asked.get(source)
        return asked is None or self.clock() - asked > RETRY_SECONDS

    def _forget(self) -> None:
        if len(self._asked) > KEPT:
            self._known.clear()
            self._asked.clear()

    async def _fetch(self, key: Key, wanted: set[Source]) -> None:
        try:
            found = await asyncio.to_thread(self.read, wanted, NOWHERE)
        except Exception:  # what a plan is made of is no reason for a run to wait
            logger.warning("configs of models could not be read", exc_info=True)
            return
        self._known |= found
        if found:
            self.look_again(key)

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

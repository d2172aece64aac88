"""One look at one run: recall it, observe, decide, write the status, act, tell.

It is looked at from memory, which may lag behind, so a look at a run at which nothing is to be done costs no call. What starts,
is stopped or is taken for ended is observed anew and decided anew first, unless it follows from ends that nothing can change any
more (:mod:`controller.operator.certainty`); the status is written against the version that was read, and where nothing is
written, the run is read again.
"""

import logging
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime, timedelta
from typing import Any, Protocol

from pydantic import ValidationError

from controller.api import meta
from controller.api.problems import from_validation
from controller.api.run import AlignmentRun, ObjectMeta, RunSpec
from controller.api.status import RunStatus
from controller.backends.base import Backend, act
from controller.backends.cluster.rights import Rights
from controller.clock import seconds_now
from controller.kube.answers import ApiError, Conflict
from controller.kube.api import Api
from controller.kube.calls import Call
from controller.kube.resources import RUNS, Object
from controller.memory import Key, Memory
from controller.operator import events
from controller.operator.certainty import has_to_be_read, to_do
from controller.operator.defaults import Defaults
from controller.operator.in_line import InLine
from controller.operator.meter import OperatorMetrics
from controller.operator.specs import Specs
from controller.plan.decide import Decision, decide, going, is_final, is_terminal, refused, rests
from controller.plan.leftovers import next_chore
from controller.plan.observed import Observed
from controller.plan.shapes import Configs
from controller.plan.verdict import in_line

logger = logging.getLogger(__name__)

NONE = Defaults()
POLL = timedelta(seconds=15)
"""Between two looks at a run in which something runs: for its progress."""
POLLS_PER_SECOND = 20.0
"""At most, of all runs together: when so many train that it would be more, each is looked at less often."""


class RemembersToo(Backend, Protocol):
    async def observe(self, run: AlignmentRun, anew: bool = True, words: bool = True) -> Observed:
        """From memory unless ``anew``. ``words``: queues are asked about jobs that still wait."""


ConfigsOf = Callable[[Key, AlignmentRun], Configs]
"""What is known of the models of a run."""


def no_configs(_: Key, __: AlignmentRun) -> Configs:
    return {}


class Reconciler:
    def __init__(
        self, api: Api, memory: Memory, backend: RemembersToo, metrics: OperatorMetrics, instance: str,
        poll: timedelta = POLL, now: Callable[[], datetime] = seconds_now, defaults: Defaults = NONE,
        configs: ConfigsOf = no_configs, clock: Callable[[], float] = time.monotonic,
    ) -> None:  # fmt: skip
        self.api = api
        self.memory = memory
        self.backend = backend
        self._rights = Rights()
        self.metrics = metrics
        self.instance = instance
        self.poll = poll
        self.now = now
        self.defaults = defaults
        self.configs = configs
        self._clock = clock
        self._moving: set[Key] = set()
        self._in_line = InLine(poll, clock)
        self._progress_told: dict[Key, float] = {}
        """When a run's progress was last written."""
        self._silent: dict[Key, float] = {}
        """Since when there is none any more."""
        self._specs = Specs()

    async def look(self, key: Key) -> timedelta | None:
        """Returns when to look again, if nothing happens before. Raises what the API server says, to be tried again."""
        document = self.memory.run(key)
        if document is None or document["metadata"].get("deletionTimestamp"):
            # What belongs to the run goes with it, by owner references.
            self.metrics.run_gone(key)
            self._forget(key)
            return None
        try:
            run = self._specs.read(document)
        except ValidationError as error:
            return await self._refuse(key, document, error)
        return await self._reconcile(key, self.defaults.applied(run), document)

    async def _reconcile(self, key: Key, run: AlignmentRun, document: Object) -> timedelta | None:
        before = run.status or RunStatus()
        if rests(run) and ((due := next_chore(run, before)) is None or due > self.now()):
            self.metrics.run_seen(key, run, before)
            return due - self.now() if due else None
        # Of one that has ended nothing is worked out any more.
        configs = {} if is_final(before, run.metadata.generation) else self.configs(key, run)
        now = self.now()

        def think(observed: Observed) -> Decision:
            return decide(run, replace(observed, configs=configs), now)

        asked = self._in_line.asks(key, in_line(before))
        decision = await self._carry_out(key, run, document, think, asked)
        self.metrics.run_seen(key, run, decision.status)
        if decision.delete_run:
            await self._delete(key, document)
        # Also while something is only on its way out: that a pod will not come back shows by its silence alone.
        moving = bool(decision.actions) or (going(decision.status) and not is_terminal(decision.status))
        again = self._again(key, moving, in_line(decision.status) and not decision.actions, asked)
        waits = [wait for wait in (decision.requeue_after, again) if wait is not None]
        return min(waits, default=None)

    def _again(self, key: Key, moving: bool, waits: bool = False, asked: bool = True) -> timedelta | None:
        """``waits``: for its queue, and does nothing else. ``asked``: the queue, just now."""
        if not moving:
            self._forget(key)
            return None
        if waits:
            self._moving.discard(key)
            return self._in_line.again(key, asked)
        self._in_line.forget(key)
        self._moving.add(key)
        return max(self.poll, timedelta(seconds=len(self._moving) / POLLS_PER_SECOND))

    def _forget(self, key: Key) -> None:
        self._moving.discard(key)
        self._in_line.forget(key)
        self._progress_told.pop(key, None)
        self._silent.pop(key, None)

    async def _carry_out(
        self,
        key: Key,
        run: AlignmentRun,
        document: Object,
        think: Callable[[Observed], Decision],
        words: bool = True,
    ) -> Decision:
        """The status is saved before anything is done: a crash in between asks again, and never forgets a failure."""
        before = run.status or RunStatus()
        observed = await self.backend.observe(run, anew=False, words=words)
        decision = think(observed)
        if self._only_progress(key, before, decision, think, observed):
            return decision
        if has_to_be_read(before, decision, observed):
            observed = await self.backend.observe(run, anew=True)
            decision = think(observed)
        actions = to_do(decision, observed)
        news: list[events.Event] = []
        if decision.status != before:
            # Of a run that cannot be read it is not known what it leaves to the operator.
            after = self.defaults.remembered(decision.status, run) if run.phases else decision.status
            news = await self._write(key, run, document, before, after)
        elif actions:
            await self._unchanged(key, document)
        try:
            await act(self.backend, run, actions, observed)
        finally:
            # The next job does not wait for what is told of the one before.
            for event in news:
                await self._tell(events.render(event, run, self.instance, self.now()))
        return decision

    def _only_progress(
        self, key: Key, before: RunStatus, decision: Decision, think: Callable[[Observed], Decision], observed: Observed
    ) -> bool:
        """Whether there is nothing to say but how far it is, and that was said, or found to be told no more, a moment ago.

        A pod's end is told before its job's: a write in between would have the next job wait.
        """
        if decision.status == before or decision.actions:
            return False
        now, known = self._clock(), {phase.name: phase.progress for phase in before.phases if phase.progress}
        since = self._since(key, told=bool(observed.progress), known=bool(known), now=now)
        recent = since is not None and now - since < self.poll.total_seconds() / 2
        if recent and think(replace(observed, progress=known)).status == before:
            return True
        if observed.progress:
            self._progress_told[key] = now
        return False

    def _since(self, key: Key, *, told: bool, known: bool, now: float) -> float | None:
        """When a run's progress was last written, or was first found to be told no more."""
        if told:
            self._silent.pop(key, None)
            return self._progress_told.get(key)
        return self._silent.setdefault(key, now) if known else None

    async def _unchanged(self, key: Key, document: Object) -> None:
        """As a write would find out. Raises Conflict."""
        found = await self.api.get_run(*key)
        self.memory.saw(RUNS, [found] if found else [])
        if found is None or found["metadata"]["resourceVersion"] != document["metadata"]["resourceVersion"]:
            raise Conflict(Call("get", RUNS), key.name, 409, "the run has changed since the watch told of it")

    async def _write(
        self, key: Key, run: AlignmentRun, document: Object, before: RunStatus, after: RunStatus
    ) -> list[events.Event]:
        """Returns what is to be told of it. Fails if the run has changed since it was read: then all of it is done anew."""
        try:
            written = await self.api.write_run_status(document, after.beside(document.get("status") or {}))
        except Conflict:
            found = await self.api.get_run(*key)
            self.memory.saw(RUNS, [found] if found else [])
            raise
        self.memory.saw(RUNS, [written])
        self.metrics.transition(key, run, before, after)
        news = list(events.transitions(before, after))
        for event in news:
            log = logger.warning if event.type == "Warning" else logger.info
            log("%s", event.note, extra={"namespace": run.metadata.namespace, "run": run.name, "reason": event.reason})
        return news

    async def _delete(self, key: Key, document: Object) -> None:
        """Unless somebody has edited it, or asked to try again, since it was read."""
        found = document["metadata"]
        try:
            await self.api.delete_run(key.namespace, key.name, found["uid"], found["resourceVersion"])
        except ApiError as error:
            if not self._rights.lacks(error, "runs that have had their time stay"):
                raise
        else:
            logger.info("the run has had its time, and is deleted", extra={"namespace": key.namespace, "run": key.name})

    async def _tell(self, event: dict[str, Any]) -> None:
        try:
            await self.api.create_event(event)
        except ApiError as error:
            # Events are for people; the status, which is written, has it too.
            logger.debug("event not written: %s", error)

    async def _refuse(self, key: Key, document: Object, error: ValidationError) -> timedelta | None:
        """A run that the CRD let through and the models do not: an older CRD, or what a schema cannot say."""
        message = "; ".join(str(problem) for problem in from_validation(error, AlignmentRun, document))
        run = as_far_as_known(document)
        before = run.status or RunStatus()
        if is_final(before, run.metadata.generation):
            self.metrics.run_seen(key, None, before)
            return None
        now = self.now()
        decision = await self._carry_out(key, run, document, lambda seen: refused(run, before, message, seen, now))
        self.metrics.run_seen(key, None, decision.status)
        return self._again(key, going(decision.status))


def as_far_as_known(document: Object) -> AlignmentRun:
    """Of a run that cannot be read, who it is, whether it is to stop, and what was said of it: enough to watch its jobs."""
    found, spec = document["metadata"], document.get("spec") or {}
    return AlignmentRun.model_construct(
        api_version=meta.API_VERSION,
        kind=meta.KIND,
        metadata=ObjectMeta.model_construct(
            name=found["name"],
            namespace=found.get("namespace"),
            uid=found.get("uid"),
            generation=found.get("generation"),
            resource_version=found.get("resourceVersion"),
        ),
        spec=RunSpec.model_construct(phases=(), suspend=spec.get("suspend") is True),
        status=RunStatus.model_validate(document.get("status") or {}),
    )

"""One look at one run: read it, observe, decide, write the status, act, tell."""

import logging
from collections.abc import Callable
from datetime import datetime, timedelta
from typing import Any

from pydantic import ValidationError

from controller.api import meta
from controller.api.problems import from_validation
from controller.api.run import AlignmentRun, ObjectMeta, RunSpec
from controller.api.status import RunStatus
from controller.backends.base import Backend
from controller.clock import seconds_now
from controller.kube import Api, ApiError, Object
from controller.operator import events
from controller.operator.defaults import Defaults
from controller.operator.meter import OperatorMetrics
from controller.operator.queue import Key
from controller.plan.decide import going, is_final, is_settled, is_terminal, refused
from controller.plan.refusal import Refusal
from controller.plan.shapes import Configs
from controller.reconcile import act, reconcile

logger = logging.getLogger(__name__)

NONE = Defaults()
POLL = timedelta(seconds=15)
"""Between two looks at a run in which something runs: for its progress."""


ConfigsOf = Callable[[Key, AlignmentRun], Configs]
"""What is known of the models of a run."""


def no_configs(_: Key, __: AlignmentRun) -> Configs:
    return {}


class Reconciler:
    def __init__(
        self, api: Api, backend: Backend, metrics: OperatorMetrics, instance: str, poll: timedelta = POLL,
        now: Callable[[], datetime] = seconds_now, defaults: Defaults = NONE, configs: ConfigsOf = no_configs,
    ) -> None:  # fmt: skip
        self.api = api
        self.backend = backend
        self.metrics = metrics
        self.instance = instance
        self.poll = poll
        self.now = now
        self.defaults = defaults
        self.configs = configs

    async def look(self, key: Key) -> timedelta | None:
        """Returns when to look again, if nothing happens before. Raises what the API server says, to be tried again."""
        document = await self.api.get_run(*key)
        if document is None or document["metadata"].get("deletionTimestamp"):
            # What belongs to the run goes with it, by owner references.
            self.metrics.run_gone(key)
            return None
        try:
            run = AlignmentRun.model_validate(document)
        except ValidationError as error:
            return await self._refuse(key, document, error)
        return await self._reconcile(key, self.defaults.applied(run), document)

    async def _reconcile(self, key: Key, run: AlignmentRun, document: Object) -> timedelta | None:
        before = run.status or RunStatus()
        if is_settled(run):
            self.metrics.run_seen(key, run, before)
            return None

        async def save(status: RunStatus) -> None:
            await self._write(key, run, document, before, self.defaults.remembered(status, run))

        decision = await reconcile(run, self.backend, self.now(), save, configs=self.configs(key, run))
        self.metrics.run_seen(key, run, decision.status)
        # Also while something is only on its way out: that a pod will not come back shows by its silence alone.
        moving = decision.actions or (going(decision.status) and not is_terminal(decision.status))
        poll = self.poll if moving else None
        waits = [wait for wait in (decision.requeue_after, poll) if wait is not None]
        return min(waits, default=None)

    async def _write(self, key: Key, run: AlignmentRun, document: Object, before: RunStatus, after: RunStatus) -> None:
        """The write fails if the run has changed since it was read: then all of it is done anew."""
        await self.api.write_run_status(document, after.beside(document.get("status") or {}))
        self.metrics.transition(key, run, before, after)
        for event in events.transitions(before, after):
            log = logger.warning if event.type == "Warning" else logger.info
            log("%s", event.note, extra={"namespace": run.metadata.namespace, "run": run.name, "reason": event.reason})
            await self._tell(events.render(event, run, self.instance, self.now()))

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
        observed = await self.backend.observe(run)
        decision = refused(before, Refusal(message, run.spec.suspend, run.metadata.generation), observed, self.now())
        if decision.status != before:
            await self._write(key, run, document, before, decision.status)
        await act(self.backend, run, decision.actions, observed)
        self.metrics.run_seen(key, None, decision.status)
        return self.poll if going(decision.status) else None


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

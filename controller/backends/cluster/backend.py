"""The backend that runs phases as jobs on a cluster. Keeps nothing that it cannot see again there."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from datetime import datetime, timedelta
from typing import Any

from controller.api import meta
from controller.api.run import AlignmentRun
from controller.api.status import PhaseProgress
from controller.backends.cluster import belongings, evidence, kinds, observe, ownership, queues, refusals, runtimes
from controller.backends.cluster.kind import JobKind, Owner
from controller.backends.cluster.network import Walls
from controller.backends.cluster.of_runs import OfRuns
from controller.backends.cluster.orphans import Orphans
from controller.backends.cluster.rights import Rights
from controller.backends.cluster.scrape import Scraper, Target
from controller.backends.cluster.settings import Settings
from controller.clock import seconds_now
from controller.kube.answers import EXISTS, ApiError, Conflict
from controller.kube.api import Api
from controller.kube.resources import Resource
from controller.memory import Anew, Memory
from controller.plan import attempts as history
from controller.plan.at_once import size_problems
from controller.plan.check import check_run
from controller.plan.job import PhaseJob
from controller.plan.observed import JobState, Observed, ObservedJob, ObservedResult
from controller.plan.place import folder_of
from trainers.contract import FailureClass

Object = dict[str, Any]

logger = logging.getLogger(__name__)

WAIT_FOR_EVENTS = timedelta(seconds=10)
SHOWN_PODS = 2


class UntilTheNextLook:
    """What was met while asking for jobs. Asking again is decided anew: until then it is remembered."""

    def __init__(self) -> None:
        self._found: OfRuns[dict[ownership.Attempted, str]] = OfRuns()

    def add(self, run: AlignmentRun, job: PhaseJob, what: str, now: datetime) -> None:
        uid = run.metadata.uid or ""
        self._found.put(uid, {**(self._found.take(uid) or {}), (job.phase, job.attempt): what}, now)

    def told(self, run: AlignmentRun, anew: bool, now: datetime) -> dict[ownership.Attempted, str]:
        uid = run.metadata.uid or ""
        return (self._found.take(uid) if anew else self._found.get(uid, now)) or {}


class ClusterBackend:
    def __init__(
        self, api: Api, memory: Memory, scraper: Scraper, settings: Settings, now: Callable[[], datetime] = seconds_now
    ) -> None:
        self.now = now
        self.api = api
        self.memory = memory
        self.scraper = scraper
        self.settings = settings
        self.absent: frozenset[Resource] = frozenset()
        """Kinds of objects that the cluster has not got."""
        self._orphans, self._rights = Orphans(), Rights()
        self.walls = Walls(api, settings.metrics_readers)
        self._unless_seen: OfRuns[dict[str, ObservedJob]] = OfRuns()
        """What became of jobs that are not there when they should be, by their name: the API server did not take them, or has
        since deleted them. Until one is seen, or the run's status has it."""
        self._barred, self._taken = UntilTheNextLook(), UntilTheNextLook()
        """Attempts whose jobs might not be made when they were asked for last, and those that met another's object."""

    # -- the four methods

    async def observe(self, run: AlignmentRun, anew: bool = True, words: bool = True) -> Observed:
        """From memory, or what the API server holds now: a call for each kind of object. For each live job in a queue one more,
        without ``words`` only if it has been let go or taken back since.

        And one for each attempt whose job is not where it should be, either way.
        """
        now, kind = self.now(), kinds.of_run(run)
        source = Anew(self.api, self.memory) if anew and not self._absent(kind) else self.memory
        found = await belongings.gather(source, self.memory, kind, run, self._orphans, now)
        jobs, pods = found.jobs, found.pods
        namespace = run.metadata.namespace or "default"
        said = await queues.words(self.api, self._rights, run, jobs, anew, words, now)
        seen = [
            await self._explained(
                replace(
                    observe.observed_job(job, pods.get(_name(job), ()), said.get(_name(job)), now),
                    unlabelled=found.unlabelled.get(_name(job), ()),
                    disowned=ownership.is_disowned(job, run),
                ),
                [job, *found.between.get(_name(job), ())],
                pods,
                now,
            )
            for job in sorted(jobs, key=_attempt)
            if not observe.is_leaving(job, pods.get(_name(job), ()), now)
        ]
        seen += observe.leaving(run, found.leaving, now)
        seen += self._missing(run, seen)
        outlived = {_name(job) for job in jobs if observe.outlived(job, pods.get(_name(job), ()), now)}
        results = {
            job.phase: result
            for job in seen
            if (result := _result(job, pods.get(job.name, ()), job.name in outlived)) is not None
        }
        return Observed(
            jobs=tuple(seen),
            results=results,
            progress=self._progress(run, seen, pods),
            taken=found.taken | self._taken.told(run, anew, now),
            held=found.held,
            barred=self._barred.told(run, anew, now),
            most=self.settings.largest_runs.get(namespace, {}),
            problems=tuple(self._problems(run)),
        )

    async def apply(self, run: AlignmentRun, job: PhaseJob) -> None:
        """Of a job of this name that is someone else's the next look tells."""
        try:
            if why := await self.walls.raise_for(run):
                self._barred.add(run, job, why, self.now())
            else:
                await self._create(run, job)
        except runtimes.Taken as owner:
            self._taken.add(run, job, str(owner), self.now())
        except ApiError as error:
            if refusals.is_unanswered(error):
                self._barred.add(run, job, error.message, self.now())
            raise

    async def delete(self, run: AlignmentRun, phase: str, attempt: int, seen: ObservedJob | None) -> None:
        """By name alone it could be anybody's: a job that this look has not seen to be the run's is not touched."""
        if seen is not None and seen.uid:
            kind, namespace = kinds.of_run(run), run.metadata.namespace or "default"
            await self.api.delete_job(kind.RESOURCE, namespace, seen.name, seen.uid, kind.PROPAGATION)

    async def reclaim(self, run: AlignmentRun, seen: ObservedJob) -> None:
        """Not one that somebody else has got meanwhile. Where it may not be written it stays the run's, and is told again."""
        kind = kinds.of_run(run)
        job = await self.api.get_job(kind.RESOURCE, run.metadata.namespace or "default", seen.name)
        if job is None or job["metadata"]["uid"] != seen.uid or not ownership.is_disowned(job, run):
            return
        try:
            written = await self.api.update_job(kind.RESOURCE, ownership.reclaimed(job, run))
        except ApiError as error:
            if self._rights.lacks(
                error, "a job that somebody takes the owner reference from stays without, and its run's"
            ):
                return
            if not (isinstance(error, Conflict) or refusals.waits(error) or refusals.refused(error, "the job")):
                raise
            logger.warning("%s has no owner reference and gets none: %s", seen.name, error)
        else:
            self.memory.saw(kind.RESOURCE, [written])

    # -- details

    async def _create(self, run: AlignmentRun, job: PhaseJob) -> None:
        """Raises what is to be asked again at once."""
        try:
            await self._ask_for(run, job)
        except ApiError as error:
            if refusals.waits(error):
                self._barred.add(run, job, error.message, self.now())
            elif why := refusals.refused(error, "the job"):
                self._expect(run, _failed(job, FailureClass.BAD_INPUT, why))
            elif error.reason != EXISTS:
                raise
        else:
            self._expect(run, _failed(job, FailureClass.INTERRUPTED, history.DELETED))

    async def _ask_for(self, run: AlignmentRun, job: PhaseJob) -> None:
        kind, owner = kinds.of_run(run), _owner(run)
        settings = replace(self.settings, image=begun_with(run, job) or self.settings.image)
        wanted, runtime = kind.render(job, owner, settings), kind.runtime(job, owner, settings)
        if runtime is None:
            made = await self.api.create_job(kind.RESOURCE, wanted)
        else:
            made = await runtimes.create_with(self.api, run, runtime, kind.RESOURCE, wanted)
        self.memory.saw(kind.RESOURCE, [made])

    def _absent(self, kind: JobKind) -> list[Resource]:
        return [resource for resource in kind.MAKERS.values() if resource in self.absent]

    def _expect(self, run: AlignmentRun, job: ObservedJob) -> None:
        uid = run.metadata.uid or ""
        self._unless_seen.put(uid, {**(self._unless_seen.take(uid) or {}), job.name: job}, self.now())

    def _missing(self, run: AlignmentRun, seen: Sequence[ObservedJob]) -> list[ObservedJob]:
        """Jobs of this run that should be there, and of whose end its status does not know yet."""
        uid, there = run.metadata.uid or "", {job.name for job in seen}
        ended = {
            (p.name, a.number) for p in (run.status.phases if run.status else ()) for a in p.attempts if a.state.ended
        }
        mine = self._unless_seen.take(uid) or {}
        left = {n: job for n, job in mine.items() if n not in there and (job.phase, job.attempt) not in ended}
        if left:
            self._unless_seen.put(uid, left, self.now())
        return [*left.values()]

    async def _explained(
        self, seen: ObservedJob, made: Sequence[Object], pods: Mapping[str, Sequence[Object]], now: datetime
    ) -> ObservedJob:
        """Pods that cannot be made or mounted say so nowhere but in events: of the job, or of what it has ``made``."""
        job = made[0]
        waits = seen.may_start_since is not None and seen.running_since is None and not seen.message
        if not waits or now - observe.running_since(job) < WAIT_FOR_EVENTS:
            return seen
        idle = [pod for pod in pods.get(seen.name, ()) if not evidence.container_state(pod, "running")]
        for thing in [*made, *idle[:SHOWN_PODS]]:
            warnings = await self._warnings(job["metadata"]["namespace"], thing["metadata"]["uid"])
            if warnings:
                return replace(seen, message=observe.warning(warnings, now))
        return seen

    async def _warnings(self, namespace: str, uid: str) -> list[Object]:
        try:
            return await self.api.list_warnings(namespace, uid)
        except ApiError as error:
            if not self._rights.lacks(error, "runs do not say why pods are not made or mounted"):
                raise
            return []

    def _problems(self, run: AlignmentRun) -> list[str]:
        found = []
        for resource in self._absent(kind := kinds.of_run(run))[:1]:
            found.append(
                f"spec.backend: {kind.KIND}: the cluster has no {resource.plural}.{resource.group} that the operator may read; "
                f"install {kind.INSTALL}"
            )
        if run.spec.workspace is None:
            found.append("spec.workspace: is not set: on a cluster name a claimName or a uri to keep artifacts in")
        for entry in run.phases:
            own = entry.template.image if entry.template else None
            if not (own or run.spec.template.image or self.settings.image):
                found.append(
                    f"spec.phases[{entry.name}].template.image: is not set, neither is spec.template.image, "
                    "and this operator has no default"
                )
        most = self.settings.largest_runs.get(run.metadata.namespace or "default", {})
        if most and run.phases and not check_run(run):
            found += map(str, size_problems(run, most))
        return found

    def _progress(
        self, run: AlignmentRun, jobs: Sequence[ObservedJob], pods: Mapping[str, Sequence[Object]]
    ) -> dict[str, PhaseProgress]:
        """What is known by now: nobody waits for a pod."""
        live = [job for job in jobs if job.state == JobState.LIVE and not job.leaving]  # the next attempt has its own
        firsts = [(job.phase, pod) for job in live for pod in pods.get(job.name, ()) if evidence.index(pod) == 0]
        targets = [(phase, target) for phase, pod in firsts if (target := _target(run, pod)) is not None]
        return self.scraper.progress(run.metadata.namespace or "default", run.name, dict(targets))


def _target(run: AlignmentRun, pod: Object) -> Target | None:
    started = evidence.container_state(pod, "running").get("startedAt")
    address = pod["status"].get("podIP")
    if not started or not address:
        return None
    namespace = run.metadata.namespace or "default"
    return Target(namespace, run.name, pod["metadata"]["uid"], address, evidence.timestamp(started))


def begun_with(run: AlignmentRun, job: PhaseJob) -> str:
    """The image that attempts at the same phase had before: it goes on from their work."""
    known = run.status.phase_status(job.phase) if run.status else None
    return known.image if known is not None and known.digest == job.digest else ""


def _failed(job: PhaseJob, failure: FailureClass, why: str) -> ObservedJob:
    return ObservedJob(job.phase, job.attempt, job.digest, JobState.FAILED, failure, why, name=job.name)


def _result(job: ObservedJob, pods: Sequence[Object], outlived: bool) -> ObservedResult | None:
    """Of a job that is outlived by a sidecar too: the planner takes it, and has the rest of the job ended."""
    if job.elsewhere and job.state == JobState.SUCCEEDED:
        return observe.result_from_elsewhere(job)
    finished = job.state == JobState.SUCCEEDED or job.failure == FailureClass.GATE_FAILED
    return observe.result_of(pods) if outlived or (finished and job.state != JobState.LIVE) else None


def _owner(run: AlignmentRun) -> Owner:
    assert run.metadata.uid is not None, "runs in a cluster have one"
    return Owner(run.metadata.namespace or "default", run.name, run.metadata.uid, folder_of(run))


def _name(job: Object) -> str:
    return str(job["metadata"]["name"])


def _attempt(job: Object) -> int:
    return int(job["metadata"]["labels"].get(meta.LABEL_ATTEMPT, "0"))

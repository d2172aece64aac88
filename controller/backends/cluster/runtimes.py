"""TrainingRuntimes: what a TrainJob refers to, made before it and its own from then on, so that both go together.

Until the job is there it is the run's. It keeps no finalizer, and whoever has got its name otherwise is passed by, as for jobs.
"""

import asyncio
from contextlib import suppress
from typing import Any

from controller.api.run import AlignmentRun
from controller.backends.cluster import ownership
from controller.kube.answers import ApiError
from controller.kube.api import Api
from controller.kube.resources import Resource

Object = dict[str, Any]

FORBIDDEN = 403
PATIENCE_SECONDS = (0.1, 0.4)
"""For the Trainer to notice a runtime, which its webhook demands: it refuses a job whose runtime it does not know yet."""


class Taken(Exception):
    """The message says whose the object is that has the runtime's name."""


async def create_with(api: Api, run: AlignmentRun, runtime: Object, resource: Resource, job: Object) -> Object:
    """The job, and its runtime before. Raises Taken, and what creating a job does."""
    there, waits = await _put(api, run, runtime)
    made = await _create(api, resource, job, waits)
    owner = {key: made[key] for key in ("apiVersion", "kind")} | {key: made["metadata"][key] for key in ("name", "uid")}
    own = {**there["metadata"], "ownerReferences": [{**owner, "controller": True}]}
    with suppress(ApiError):  # then it goes with the run
        await api.update_runtime({**there, "metadata": own})
    return made


async def _put(api: Api, run: AlignmentRun, runtime: Object) -> tuple[Object, tuple[float, ...]]:
    """As the API server has it, and how long to wait for the Trainer. One may be left of a try with other settings."""
    metadata = runtime["metadata"]
    there = await api.get_runtime(metadata["namespace"], metadata["name"])
    if there is None:
        return await api.create_runtime(runtime), PATIENCE_SECONDS
    if not ownership.is_ours(there, run):
        raise Taken(ownership.told(there))
    return await api.update_runtime({**there, "spec": runtime["spec"]}), ()


async def _create(api: Api, resource: Resource, job: Object, waits: tuple[float, ...]) -> Object:
    for wait in waits:
        try:
            return await api.create_job(resource, job)
        except ApiError as error:
            if error.status != FORBIDDEN:
                raise
        await asyncio.sleep(wait)
    return await api.create_job(resource, job)

"""`python -m controller.operator.smoke RUN`: apply a run and wait for its end. `helm test` does this in a pod."""

import asyncio
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import aiohttp
import typer
import yaml

from controller.api import meta
from controller.api.status import RunStatus
from controller.kube.answers import ApiError, NotFound
from controller.kube.api import Api
from controller.kube.transport import Login, Transport

EVERY_SECONDS = 2.0
MARK = f"{meta.GROUP}/smoke-test"
"""Annotation of the runs that are made here: others are never deleted."""

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


class DidNotSucceed(Exception):
    """The message says why, as far as the cluster knows."""


@app.command()
def smoke(
    run: Annotated[Path, typer.Argument(help="An AlignmentRun in YAML, with its namespace.", show_default=False)],
    timeout: Annotated[float, typer.Option(help="Seconds that it may take.")] = 900.0,
    kubeconfig: Annotated[Path | None, typer.Option(help="Run outside a cluster with these credentials.")] = None,
) -> None:
    """Apply a run, wait until it has succeeded, and delete it. One that has not is kept, to be looked at."""
    from controller.operator.login import NoCredentials, login_of

    document = yaml.safe_load(run.read_text())
    metadata = document["metadata"]
    where = f"alignmentrun {metadata['name']} in namespace {metadata['namespace']}"
    try:
        asyncio.run(_connected(login_of(kubeconfig), document, timeout))
    except NoCredentials as error:
        sys.exit(f"error: {error}")
    except (ApiError, DidNotSucceed) as error:
        sys.exit(f"{where}: {error}\nsee: kubectl describe alignmentrun {metadata['name']} -n {metadata['namespace']}")
    typer.echo(f"{where}: succeeded")


async def _connected(login: Login, run: dict[str, Any], timeout: float) -> None:
    transport = Transport(login)
    try:
        await _smoke(Api(transport), run, timeout)
    finally:
        await transport.close()


async def _smoke(api: Api, run: dict[str, Any], timeout: float) -> None:
    namespace, name = run["metadata"]["namespace"], run["metadata"]["name"]
    give_up = time.monotonic() + timeout
    while (earlier := await api.get_run(namespace, name)) is not None:
        await api.delete_run(namespace, name, _uid_of_a_test(earlier))
        await _wait(give_up, "an earlier one does not go away")
    uid = await _create(api, run)
    await _succeed(api, namespace, name, give_up)
    await api.delete_run(namespace, name, uid)


def _uid_of_a_test(earlier: dict[str, Any]) -> str:
    """A run that somebody else has given this name is his."""
    metadata = earlier["metadata"]
    if MARK not in (metadata.get("annotations") or {}):
        raise DidNotSucceed("is no test's run: delete it, or give the test another name (the chart's fullnameOverride)")
    return str(metadata["uid"])


async def _create(api: Api, run: dict[str, Any]) -> str:
    """Its uid."""
    metadata = run["metadata"]
    marked = {**metadata, "annotations": {**metadata.get("annotations", {}), MARK: "true"}}
    try:
        created = await api.create_run({**run, "metadata": marked})
        return str(created["metadata"]["uid"])
    except NotFound as error:
        raise DidNotSucceed(f"{error}: is the CustomResourceDefinition installed (crds.enabled)?") from error


async def _succeed(api: Api, namespace: str, name: str, give_up: float) -> None:
    told = ""
    while True:
        status = await _status(api, namespace, name)
        now = " ".join(filter(None, (status.phase, status.progress, status.step)))
        if now != told:
            typer.echo(now)
            told = now
        if status.is_true(meta.SUCCEEDED):
            return
        failed = status.condition(meta.FAILED)
        if failed is not None and failed.status == "True":
            raise DidNotSucceed(f"{failed.reason}: {failed.message}")
        await _wait(give_up, f"not at its end in time; {_hint(status)}")


async def _status(api: Api, namespace: str, name: str) -> RunStatus:
    """Empty while the API server cannot be reached: its replicas may be restarting."""
    try:
        found = await api.get_run(namespace, name)
    except (aiohttp.ClientError, TimeoutError, OSError) as error:
        typer.echo(f"{error}; trying again", err=True)
        return RunStatus()
    if found is None:
        raise DidNotSucceed("somebody has deleted it")
    return RunStatus.model_validate(found.get("status") or {})


async def _wait(give_up: float, otherwise: str) -> None:
    if time.monotonic() >= give_up:
        raise DidNotSucceed(otherwise)
    await asyncio.sleep(EVERY_SECONDS)


def _hint(status: RunStatus) -> str:
    if not status.conditions:
        return "no operator has looked at it: does one run, and watch this namespace?"
    return "; ".join(phase.message for phase in status.phases if phase.message) or f"it is {status.phase}"


if __name__ == "__main__":
    app()

"""The listed namespaces that are there.

One that is deleted takes the operator's Role in it along, so that reading it is forbidden from then on. That must not take
the operator from everybody else's runs, which is what kopf's watches do: they give up after a minute.
"""

import asyncio
import logging
from collections.abc import Sequence

import aiohttp

from controller.kube.answers import ApiError
from controller.kube.api import Api
from controller.kube.resources import RUNS

logger = logging.getLogger(__name__)

EVERY_SECONDS = 30.0
FORBIDDEN = 403


class NamespaceIsBack(Exception):
    """Watches begin at the start of the process only."""


async def readable(api: Api, namespaces: Sequence[str]) -> tuple[str, ...]:
    """Those of ``namespaces`` that may be read. Raises ApiError when none may."""
    found, refusal = [], None
    for namespace in namespaces:
        try:
            await api.serves(RUNS, namespace)
            found.append(namespace)
        except ApiError as error:
            if error.status != FORBIDDEN:
                raise
            refusal = error
            logger.warning(
                "namespace %s is not watched, it is deleted or lacks the operator's Role: %s", namespace, error
            )
    if refusal is not None and not found:
        raise refusal
    return tuple(found)


async def until_back(api: Api, absent: Sequence[str]) -> None:
    """Raises NamespaceIsBack as soon as one of ``absent`` may be read."""
    while True:
        await asyncio.sleep(EVERY_SECONDS)
        for namespace in absent:
            try:
                await api.serves(RUNS, namespace)
            except (ApiError, aiohttp.ClientError, TimeoutError, OSError):
                continue
            raise NamespaceIsBack(namespace)

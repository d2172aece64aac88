"""What the API server, or a proxy in its place, has answered: an object, or why there is none."""

import json
from collections.abc import AsyncIterator

import aiohttp

from controller.api.text import plain
from controller.kube.calls import Call
from controller.kube.resources import Object

LONGEST_WAIT_SECONDS = 300.0
"""That an answer may ask for: a run would stand still for ever, if a proxy asks for a year."""

EXISTS = "AlreadyExists"
"""The reason of a Conflict at a creation: there is one of this name. A webhook may say 409 and mean something else."""


class ApiError(Exception):
    """The API server said no."""

    def __init__(
        self, call: Call, name: str, status: int, message: str, retry_after: float | None = None, reason: str = ""
    ) -> None:
        # A webhook may have said it, or quoted what a user wrote.
        self.message = plain(message)
        super().__init__(f"{call.verb} {call.resource.plural} {name}: {status} {self.message}")
        self.call = call
        self.status = status
        self.retry_after = retry_after
        """Seconds that the server asked us to wait."""
        self.reason = reason
        """The Status' own, as `AlreadyExists`."""


class Conflict(ApiError):
    """Someone else has written it since we read it, or it exists already."""


class NotFound(ApiError):
    """The object is not there, or its kind is unknown to the server."""


def items(page: Object) -> list[Object]:
    """An empty list of metadata is null."""
    return page["items"] or []


async def lines(response: aiohttp.ClientResponse) -> AsyncIterator[str]:
    """However long they are: aiohttp's own end at 128 KiB."""
    left = b""
    async for chunk in response.content.iter_any():
        *whole, left = (left + chunk).split(b"\n")
        for line in whole:
            yield line.decode(errors="replace")


def error_of(call: Call, name: str, response: aiohttp.ClientResponse, text: str) -> ApiError:
    kind = {404: NotFound, 409: Conflict}.get(response.status, ApiError)
    wait = response.headers.get("Retry-After", "")
    seconds = min(float(wait), LONGEST_WAIT_SECONDS) if wait.isdecimal() else None
    return kind(call, name, response.status, _message(text), seconds, _told(text, "reason") or "")


def object_of(call: Call, name: str, status: int, text: str) -> Object:
    """Raises ApiError of what is no object: a proxy or a portal between answers in the API server's place."""
    try:
        found = json.loads(text)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise ApiError(call, name, status, f"the answer is no object: {_message(text)}")
    return found


def _message(text: str) -> str:
    """A Status' message, or the first line of whatever a proxy said."""
    told = _told(text, "message")
    return (text.strip().splitlines() or ["no message"])[0][:200] if told is None else told


def _told(text: str, field: str) -> str | None:
    """What a Status says; None if it is none, or does not say."""
    try:
        return str(json.loads(text)[field])
    except (ValueError, KeyError, TypeError):
        return None

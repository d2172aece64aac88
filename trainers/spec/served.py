"""Models that a vLLM server has: where it is, and what it calls them."""

import re
from typing import Self
from urllib.parse import urlsplit

from pydantic import Field, model_validator

from trainers.spec.base import SpecModel

HOST = re.compile(r"[A-Za-z0-9_.-]+|[0-9A-Fa-f:.]+")


class Served(SpecModel):
    """Where a model is served. The address may change; what the server says may not."""

    NOT_IDENTITY = frozenset({"url", "key_variable"})

    url: str | None = None
    """vLLM server that has the model (`http://vllm.team:8000`)."""
    served_as: str | None = Field(default=None, min_length=1, max_length=256)
    """The model's name there; the server's only model unless set."""
    key_variable: str | None = Field(default=None, max_length=256, pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")
    """Environment variable with the server's API key (`template.secretRefs` brings it in)."""

    @model_validator(mode="after")
    def _address(self) -> Self:
        if self.url is not None:
            if problem := address_problem(self.url):
                raise ValueError(f"url {problem}")
            return self
        for name, value in (("servedAs", self.served_as), ("keyVariable", self.key_variable)):
            if value is not None:
                raise ValueError(f"{name} {value} is of a server: set url, or leave {name} out")
        return self


def address_problem(url: str) -> str | None:
    """What is wrong with a server's address, without what may be a password in it; None if it can be asked."""
    wanted = "write http://HOST:PORT or https://HOST"
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        return f"{url!r} is no address: {wanted}"
    if "@" in parts.netloc:
        return "holds a name or a password: leave it out, and name the variable of the key in keyVariable"
    if parts.scheme not in ("http", "https"):
        return f"{url!r} is not of http or https: {wanted}"
    if not HOST.fullmatch(parts.hostname or "") or port == 0:
        return f"{url!r} names no host that could be asked: {wanted}"
    if parts.query or parts.fragment:
        return f"{url!r} has more than an address: {wanted}"
    return None

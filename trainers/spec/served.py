"""Models that a vLLM server has: where it is, and what it calls them."""

import re
from collections.abc import Mapping, Set
from typing import Annotated, Self
from urllib.parse import urlsplit

from pydantic import Field, StringConstraints, model_validator

from trainers.spec.base import SpecModel
from trainers.spec.server_flags import LENGTH_FLAG, NEGATIVE, flag_problem, read_count

HOST = re.compile(r"[A-Za-z0-9_.-]+|[0-9A-Fa-f:.]+")

SHORTEST = 4
"""Letters of a beginning that vLLM may take for one flag, with the dashes."""

Word = Annotated[str, StringConstraints(min_length=1, max_length=1024)]

SET_BY_THE_PHASE = frozenset(
    {
        "--model",
        "--host",
        "--port",
        "--uds",
        "--served-model-name",
        "--api-key",
        "--ssl-keyfile",
        "--root-path",
        "--config",
        "--logprobs-mode",
    }
)
"""Flags of vLLM by which its server would be another's, or not be found, or tell what was not asked for."""

ANOTHER_MODEL = frozenset(
    {
        "--tokenizer",
        "--tokenizer-mode",
        "--tokenizer-revision",
        "--skip-tokenizer-init",
        "--revision",
        "--code-revision",
        "--hf-config-path",
        "--hf-overrides",
        "--model-class-overrides",
        "--logits-processors",
    }
)
"""Flags of vLLM 0.32 by which tokens or probabilities would not be those of the phase's model (`vllm/engine/arg_utils.py`).

What an arithmetic rounds is the user's choice: `--dtype`, `--quantization`, `--kv-cache-dtype`.
"""


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


class OwnServer(SpecModel):
    """A vLLM server that the phase starts, and ends with itself. On a cluster it is a second container (`template.server`)."""

    NOT_IDENTITY = frozenset({"command", "start_timeout_seconds"})

    command: tuple[Word, ...] = Field(default=("vllm", "serve"), min_length=1, max_length=16)
    """What starts it, in front of the model and flags; a program in an environment of its own by its path: `[/opt/vllm/bin/vllm, serve]`."""
    args: tuple[Word, ...] = Field(default=(), max_length=64)
    """Flags of its own, for example `[--max-model-len, "4096"]`. They may change its arithmetic, so they are part of a result's identity."""
    start_timeout_seconds: int = Field(default=1800, ge=1)
    """How long it may take until it answers."""

    @property
    def flags(self) -> dict[str, str]:
        """`args` by their names, of which vLLM takes `--max_model_len` for `--max-model-len`; empty for those without a value."""
        found: dict[str, str] = {}
        for word, after in zip(self.args, [*self.args[1:], "-"], strict=False):
            if _is_flag(word):
                name, sign, value = word.partition("=")
                beside = "" if _is_flag(after) else after
                found[name.replace("_", "-")] = value if sign else beside
        return found

    def with_flags(self, changed: Mapping[str, str]) -> list[str]:
        """`args` with other values of some flags, each a word with its value."""
        kept: list[str] = []
        goes = False
        for word in self.args:
            named = _is_flag(word)
            goes = word.partition("=")[0].replace("_", "-") in changed if named else goes
            kept += [] if goes else [word]
        return [*kept, *(f"{name}={value}" for name, value in changed.items())]

    @property
    def longest(self) -> int | None:
        """Tokens that prompt and response may have together, where `args` say."""
        return read_count(self.flags.get(LENGTH_FLAG, ""))

    @model_validator(mode="after")
    def _starts(self) -> Self:
        if problem := flag_problem(self.flags):
            raise ValueError(f"args: {problem}")
        return self

    @model_validator(mode="after")
    def _ours(self) -> Self:
        for word in self.args:
            if _means(word, SET_BY_THE_PHASE):
                raise ValueError(f"args: {word} is set by the phase: leave it out")
            if _means(word, ANOTHER_MODEL):
                raise ValueError(f"args: {word} makes it another model than the phase's: leave it out")
        if any(value == "dummy" for name, value in self.flags.items() if _means(name, {"--load-format"})):
            raise ValueError("args: --load-format dummy has random weights: leave it out")
        return self


def _is_flag(word: str) -> bool:
    return word.startswith("-") and not NEGATIVE.fullmatch(word)


def _means(word: str, flags: Set[str]) -> bool:
    """Whether vLLM takes a word for one of these flags: underscores, `--flag=value`, `--flag.key value`, beginnings."""
    name = re.split(r"[=.]", word, maxsplit=1)[0].replace("_", "-")
    return len(name) > SHORTEST and name.startswith("--") and any(flag.startswith(name) for flag in flags)


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

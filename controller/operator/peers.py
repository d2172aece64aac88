"""Who may read trainers' metrics, as a NetworkPolicy has it: what the API server refuses of it is said at the start.

It would be refused with the policy of each run, and no run would get a job.
"""

import ipaddress
import json
import re
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, Field, TypeAdapter, ValidationError, model_validator

from controller.api.labels import LabelValue
from controller.api.problems import shown
from controller.api.syntax import QUALIFIED
from trainers.spec import SpecModel

OPTION = "--metrics-readers"


class BadPeers(ValueError):
    """The message names the option, the field in it, its value and what would be right."""


def _label(key: str) -> str:
    if not QUALIFIED.fits(key):
        raise ValueError(f"{shown(key)} is not {QUALIFIED.words}")
    return key


def _network(text: str) -> str:
    try:
        ipaddress.ip_network(text, strict=False)
    except ValueError:
        is_network = False
    else:
        is_network = re.search("/[0-9]+$", text) is not None
    if not is_network:
        raise ValueError(f"{shown(text)} is not a network: ADDRESS/BITS (10.0.0.0/8)")
    return text


Label = Annotated[str, AfterValidator(_label)]
Network = Annotated[str, AfterValidator(_network)]


class Requirement(SpecModel):
    key: Label
    operator: Literal["In", "NotIn", "Exists", "DoesNotExist"]
    values: tuple[LabelValue, ...] | None = None

    @model_validator(mode="after")
    def _values_fit(self) -> Self:
        if bool(self.values) == (self.operator in ("Exists", "DoesNotExist")):
            raise ValueError(f"{self.key}: {self.operator} {'has no values' if self.values else 'needs values'}")
        return self


class Selector(SpecModel):
    match_labels: dict[Label, LabelValue] | None = None
    match_expressions: tuple[Requirement, ...] | None = None


class Block(SpecModel):
    cidr: Network
    but: tuple[Network, ...] | None = Field(default=None, alias="except")

    @model_validator(mode="after")
    def _within(self) -> Self:
        whole = ipaddress.ip_network(self.cidr, strict=False)
        for text in self.but or ():
            part = ipaddress.ip_network(text, strict=False)
            if part.network_address not in whole or part.prefixlen <= whole.prefixlen:
                raise ValueError(f'"{text}" is no part of cidr, "{self.cidr}"')
        return self


class Peer(SpecModel):
    pod_selector: Selector | None = None
    namespace_selector: Selector | None = None
    ip_block: Block | None = None

    @model_validator(mode="after")
    def _is_one(self) -> Self:
        selects = self.pod_selector is not None or self.namespace_selector is not None
        if selects == (self.ip_block is not None):
            raise ValueError("a peer has an ipBlock, or a podSelector, a namespaceSelector or both")
        return self


PEERS = TypeAdapter(tuple[Peer, ...])


def peers(text: str | None) -> tuple[dict[str, Any], ...] | None:
    """As they are given, or None if they are not. Raises BadPeers."""
    if not text:
        return None
    try:
        PEERS.validate_json(text)
    except ValidationError as error:
        raise BadPeers(f"{OPTION}{_said(error)}") from error
    return tuple(json.loads(text))


def _said(error: ValidationError) -> str:
    """Of the first that is wrong."""
    found = error.errors()[0]
    place = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in found["loc"])
    if found["type"] == "value_error":
        return f"{place}: {found['msg'].removeprefix('Value error, ')}"
    message = "no such field of a peer" if found["type"] == "extra_forbidden" else found["msg"]
    return f"{place}: {shown(found['input'])}: {message}; as a NetworkPolicy has its peers; [] lets everybody in"

"""The calls that are made. RBAC rules are generated from them: what is not here is not allowed."""

from dataclasses import dataclass

from controller.kube.resources import (
    BETWEEN,
    CORE_EVENTS,
    EVENTS,
    JOBS,
    LEASES,
    NETWORK_POLICIES,
    RUN_STATUS,
    RUNS,
    TRAINING_RUNTIMES,
    WATCHED,
    WORKLOADS,
    Resource,
)


@dataclass(frozen=True)
class Call:
    verb: str
    resource: Resource


CALLS = (
    Call("get", RUNS),
    *(Call(verb, resource) for resource in WATCHED for verb in ("list", "watch")),
    Call("delete", RUNS),
    Call("update", RUN_STATUS),
    *(Call(verb, resource) for resource in JOBS for verb in ("get", "create", "update", "delete")),
    *(Call("get", resource) for resource in BETWEEN),
    *(Call(verb, TRAINING_RUNTIMES) for verb in ("get", "create", "update")),
    *(Call(verb, resource) for resource in WORKLOADS for verb in ("get", "list")),
    Call("create", EVENTS),
    Call("list", CORE_EVENTS),
)
"""In the namespaces that are watched."""

WALL_CALLS = tuple(Call(verb, NETWORK_POLICIES) for verb in ("get", "create", "update"))
"""In the same, where runs have NetworkPolicies."""

LEASE_CALLS = (Call("get", LEASES), Call("create", LEASES), Call("update", LEASES))
"""In the operator's own namespace."""

SMOKE_CALLS = (Call("create", RUNS), Call("delete", RUNS), Call("get", RUNS))
"""Of :mod:`controller.operator.smoke`, which has rights of its own."""

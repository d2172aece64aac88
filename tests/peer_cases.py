"""Peers as a NetworkPolicy can and cannot have them, shown to the operator at its start and to the real API server."""

from typing import Any

Object = dict[str, Any]


def of(*requirements: Object, **peer: Any) -> Object:
    return {"podSelector": {"matchExpressions": list(requirements)}, **peer}


GOOD: dict[str, Object] = {
    "all namespaces": {"namespaceSelector": {}},
    "pods by their labels": {"podSelector": {"matchLabels": {"app.kubernetes.io/name": "prometheus"}}},
    "both": {"podSelector": {}, "namespaceSelector": {"matchLabels": {"team": ""}}},
    "requirements": of({"key": "a", "operator": "In", "values": ["b"]}, {"key": "b/c", "operator": "Exists"}),
    "addresses": {"ipBlock": {"cidr": "10.1.2.3/8", "except": ["10.4.0.0/16"]}},
    "addresses of another kind": {"ipBlock": {"cidr": "fd00::/8"}},
}
BAD: dict[str, tuple[Object, str]] = {
    "a word": ({"namespaceSelector": "foo"}, '[0].namespaceSelector: "foo": '),
    "another field": ({"nsSelector": {}}, "[0].nsSelector: a mapping: no such field of a peer"),
    "nobody": ({}, "[0]: a peer has an ipBlock, or a podSelector"),
    "address and name": ({"podSelector": {}, "ipBlock": {"cidr": "10.0.0.0/8"}}, "[0]: a peer has an ipBlock, or a"),
    "an address": ({"ipBlock": {"cidr": "10.0.0.1"}}, '[0].ipBlock.cidr: "10.0.0.1" is not a network'),
    "no address": ({"ipBlock": {"cidr": "10.0.0.0/33"}}, '[0].ipBlock.cidr: "10.0.0.0/33" is not a network'),
    "elsewhere": ({"ipBlock": {"cidr": "10.0.0.0/8", "except": ["11.0.0.0/16"]}}, '"11.0.0.0/16" is no part of cidr'),
    "all of it": ({"ipBlock": {"cidr": "10.0.0.0/8", "except": ["10.0.0.0/8"]}}, '"10.0.0.0/8" is no part of cidr'),
    "no key": ({"podSelector": {"matchLabels": {"a b": "c"}}}, '"a b" is not a key'),
    "no value": ({"podSelector": {"matchLabels": {"a": "b c"}}}, '[0].podSelector.matchLabels.a: "b c": '),
    "no values": (of({"key": "a", "operator": "In"}), "a: In needs values"),
    "values": (of({"key": "a", "operator": "Exists", "values": ["b"]}), "a: Exists has no values"),
    "no operator": (of({"key": "a", "operator": "Is"}), '[0].podSelector.matchExpressions[0].operator: "Is": '),
}

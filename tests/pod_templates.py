"""Templates whose pods Kubernetes refuses, with what is said of each beforehand, and some alike that it takes.

Both are shown to the real API server (operator/test_as_kubernetes_says.py) and to the checks of runs
(controller/test_impossible_pods.py).
"""

from typing import Any

Object = dict[str, Any]


def resources(requests: Object | None = None, limits: Object | None = None) -> Object:
    return {"resources": {"requests": requests or {}, "limits": limits or {}}}


def spread(**numbers: int) -> Object:
    return {"topologySpreadConstraints": [{"topologyKey": "a", **numbers}]}


GPU = "nvidia.com/gpu"
PAGES = "hugepages-2Mi"
PROFILE = "container.apparmor.security.beta.kubernetes.io"

REFUSED: dict[str, tuple[Object, str]] = {
    "more asked than allowed": (
        resources({"cpu": "2001m"}, {"cpu": 2}),
        'resources.requests[cpu]: "2001m" is more than the limit, "2"',
    ),
    "of a disk": (
        resources({"ephemeral-storage": "2Gi"}, {"ephemeral-storage": "2G"}),
        'requests[ephemeral-storage]: "2Gi" is more than the limit, "2G"',
    ),
    "devices without a limit": (resources({GPU: 1}), f'requests[{GPU}]: "1" needs a limit of as much'),
    "fewer devices than the limit": (resources({GPU: 1}, {GPU: 2}), f'requests[{GPU}]: "1" is not the limit, "2"'),
    "half a device": (resources({}, {GPU: "1500m"}), f'limits[{GPU}]: "1500m" is not a whole number'),
    "pages without a limit": (resources({PAGES: "4Mi", "cpu": 1}), f'requests[{PAGES}]: "4Mi" needs a limit of as much'),
    "fewer pages than the limit": (
        resources({PAGES: "4Mi", "cpu": 1}, {PAGES: "8Mi"}),
        f'requests[{PAGES}]: "4Mi" is not the limit, "8Mi"',
    ),
    "half a page": (resources({}, {PAGES: "3Mi", "cpu": 1}), f'limits[{PAGES}]: "3Mi" is not a multiple'),
    "pages of no size": (resources({}, {"hugepages-x": "4Mi", "cpu": 1}), 'limits[hugepages-x]: "x" is no size of pages'),
    "nothing but pages": (resources({}, {PAGES: "4Mi"}), f"resources: {PAGES} needs cpu or memory beside it"),
    "a claim of nothing": (
        {"volumes": [{"mountPath": "/a", "ephemeral": {"size": "0"}}]},
        'volumes[0].ephemeral.size: "0" is no size',
    ),
    "a mirror": ({"annotations": {"kubernetes.io/config.mirror": "x"}}, "[kubernetes.io/config.mirror]: is how another"),
    "a profile that is none": ({"annotations": {f"{PROFILE}/pytorch": "mine"}}, '"mine" is no profile'),
    "a cost that is none": (
        {"annotations": {"controller.kubernetes.io/pod-deletion-cost": "+1"}},
        '"+1" is not a whole number of 32 bits',
    ),
    "a cost of more bits": (
        {"annotations": {"controller.kubernetes.io/pod-deletion-cost": str(2**31)}},
        '"2147483648" is not a whole number of 32 bits',
    ),
    "tolerations as they were": ({"annotations": {"scheduler.alpha.kubernetes.io/tolerations": "x"}}, "is retired"),
}  # fmt: skip

TAKEN: dict[str, Object] = {
    "as much as allowed": resources({"cpu": "2000m", "memory": "1Gi"}, {"cpu": 2, "memory": "1Gi"}),
    "limits alone": resources({}, {GPU: 8, PAGES: "4Mi", "memory": "1Gi"}),
    "requests alone": resources({"cpu": 2, "ephemeral-storage": "1Gi"}),
    "as many devices": resources({GPU: "2"}, {GPU: "2000m"}),
    "pages asked for as they are limited": resources({PAGES: "4Mi", "cpu": 1}, {PAGES: "4096Ki"}),
    "pages of several sizes": resources({}, {PAGES: "4Mi", "hugepages-1Gi": "1Gi", "cpu": 1}),
    "a claim": {"volumes": [{"mountPath": "/a", "ephemeral": {"size": "1"}}]},
    "a profile": {"annotations": {f"{PROFILE}/pytorch": "runtime/default"}},
    "a cost": {"annotations": {"controller.kubernetes.io/pod-deletion-cost": "-2147483648"}},
    "the most that 32 bits hold": spread(maxSkew=2**31 - 1, minDomains=2**31 - 1),
    "the longest": {
        "tolerations": [{"key": "a", "operator": "Exists", "effect": "NoExecute", "tolerationSeconds": 2**63 - 1}]
    },
}  # fmt: skip

UNREADABLE: dict[str, tuple[Object, str]] = {
    "a skew of more bits": (spread(maxSkew=2**31), "less than or equal to 2147483647"),
    "domains of more bits": (spread(minDomains=2**33), "less than or equal to 2147483647"),
}
"""That the run's own schema refuses."""

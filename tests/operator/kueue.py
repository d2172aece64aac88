"""Quota for a namespace's runs."""

from typing import Any

Object = dict[str, Any]
API = "kueue.x-k8s.io/v1beta2"


def quota(namespace: str, cpu: str) -> list[Object]:
    """Named as in manifests/components/kueue: a queue with so many CPUs, and two priorities, of which one preempts."""
    name = f"quota-{namespace}"
    return [
        {"apiVersion": API, "kind": "ResourceFlavor", "metadata": {"name": name}},
        {
            "apiVersion": API,
            "kind": "ClusterQueue",
            "metadata": {"name": name},
            "spec": {
                "namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": namespace}},
                "preemption": {"withinClusterQueue": "LowerPriority"},
                "resourceGroups": [
                    {
                        "coveredResources": ["cpu", "memory"],
                        "flavors": [
                            {
                                "name": name,
                                "resources": [
                                    {"name": "cpu", "nominalQuota": cpu},
                                    {"name": "memory", "nominalQuota": "64Gi"},
                                ],
                            }
                        ],
                    }
                ],
            },
        },
        {
            "apiVersion": API,
            "kind": "LocalQueue",
            "metadata": {"name": "alignment", "namespace": namespace},
            "spec": {"clusterQueue": name},
        },
        *(
            {"apiVersion": API, "kind": "WorkloadPriorityClass", "metadata": {"name": level}, "value": value}
            for level, value in (("alignment-low", 1), ("alignment-high", 1000))
        ),
    ]

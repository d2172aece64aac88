"""Everything that a cluster holds, to be compared."""

from cluster.client import Cluster

Thing = tuple[str, str, str]
# What a cluster makes and forgets by itself.
_OF_ITS_OWN = {"events", "events.events.k8s.io", "componentstatuses", "nodes", "pods.metrics.k8s.io"}


def inventory(cluster: Cluster) -> set[Thing]:
    """(resource, namespace, name) of every object that can be listed."""
    resources = cluster.kubectl("api-resources", "--verbs=list", "-o", "name").split()
    wanted = [name for name in resources if name not in _OF_ITS_OWN]
    columns = "custom-columns=KIND:.kind,API:.apiVersion,NS:.metadata.namespace,NAME:.metadata.name"
    text = cluster.kubectl("get", ",".join(wanted), "-A", "--no-headers", "-o", columns, timeout=120)
    things = {(f"{kind}.{api}", namespace, name) for kind, api, namespace, name in map(str.split, text.splitlines())}
    return {thing for thing in things if not _is_noise(thing)}


def _is_noise(thing: Thing) -> bool:
    kind, namespace, name = thing
    leases = kind.startswith("Lease.") and namespace in ("kube-system", "kube-node-lease")
    return leases or name == "kube-root-ca.crt"

"""Who may reach a run's pods: its own pods, and others for metrics alone. One NetworkPolicy for each run."""

from collections.abc import Sequence
from typing import Any

from controller.api import meta
from controller.api.run import AlignmentRun
from controller.backends.cluster import ownership, refusals
from controller.backends.cluster.references import reference
from controller.kube.answers import ApiError, Conflict
from controller.kube.api import Api
from controller.plan.foreign import handed_on
from controller.plan.job import kin
from trainers.contract import DEFAULT_METRICS_PORT

Object = dict[str, Any]

MOST_PROCESSES = 64
"""Of a pod; each has a port for its metrics."""
AGAIN = "its NetworkPolicy is being changed by somebody else"


class Walls:
    def __init__(self, api: Api, readers: Sequence[Object] | None) -> None:
        """``readers``: peers that may read metrics, everybody if there are none. None: no policies are made."""
        self.api = api
        self.readers = readers

    async def raise_for(self, run: AlignmentRun) -> str:
        """Before a job is made. Returns why it cannot be done now; empty if it is done, or not wanted."""
        if self.readers is None:
            return ""
        try:
            return await self._raise(policy(run, self.readers), run)
        except ApiError as error:
            if refusals.waits(error):
                return error.message
            if why := refusals.refused(error, "its NetworkPolicy"):
                return why
            if not isinstance(error, Conflict):
                raise
            return AGAIN

    async def _raise(self, wanted: Object, run: AlignmentRun) -> str:
        metadata = wanted["metadata"]
        there = await self.api.get_network_policy(metadata["namespace"], metadata["name"])
        if there is None:
            await self.api.create_network_policy(wanted)
        elif not ownership.is_ours(there, run):
            return f"the name of its NetworkPolicy is taken by {ownership.told(there, 'NetworkPolicy')}, which is left alone"
        elif there["spec"] != wanted["spec"]:
            await self.api.update_network_policy({**there, "spec": wanted["spec"]})
        return ""


def policy(run: AlignmentRun, readers: Sequence[Object]) -> Object:
    """As long as the run. Its name has the run's identity: nobody else's is called so by chance."""
    assert run.metadata.uid is not None, "runs in a cluster have one"
    own = {"matchLabels": {meta.LABEL_MANAGED_BY: meta.PRODUCT, meta.LABEL_RUN: run.name}}
    last = DEFAULT_METRICS_PORT + MOST_PROCESSES - 1
    metrics: Object = {"ports": [{"protocol": "TCP", "port": DEFAULT_METRICS_PORT, "endPort": last}]}
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": {
            "name": f"{run.name}-{run.metadata.uid[:8]}",
            "namespace": run.metadata.namespace or "default",
            "labels": {**handed_on(run.metadata.labels), **own["matchLabels"], **kin(run.name)},
            "ownerReferences": [reference(run.name, run.metadata.uid)],
        },
        "spec": {
            "podSelector": own,
            "policyTypes": ["Ingress"],
            # Libraries for collectives talk on ports of their own choice, so what is the run's own may do everything.
            "ingress": [{"from": [{"podSelector": own}]}, {**metrics, **({"from": list(readers)} if readers else {})}],
        },
    }

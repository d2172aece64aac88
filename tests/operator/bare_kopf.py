"""kopf with a handler that does nothing but note what it is told of: what any operator on kopf costs at least."""

import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import kopf
from ends import ended

from controller.kube.resources import JOBS, PODS, RUNS
from controller.operator import handlers
from controller.operator.login import login_of

KUBECONFIG, NOTES = Path(sys.argv[1]), Path(sys.argv[2])


def main() -> None:
    told: set[str] = set()
    runs: set[str] = set()
    registry = kopf.OperatorRegistry()
    login = login_of(KUBECONFIG)

    @kopf.on.login(registry=registry)
    def _login(**_: Any) -> kopf.ConnectionInfo:
        return login()

    with NOTES.open("w", buffering=1) as notes:
        for resource in (RUNS, *JOBS, PODS):

            @kopf.on.event(resource.group, resource.version, resource.plural, registry=registry)
            async def _event(event: Mapping[str, Any], **_: Any) -> None:
                name = event["object"]["metadata"]["name"]
                if (
                    event["object"]["kind"] == "AlignmentRun"
                    and (uid := event["object"]["metadata"]["uid"]) not in runs
                ):
                    runs.add(uid)
                    notes.write(f"runs {len(runs)}\n")
                if event["object"]["kind"] == "PyTorchJob" and name not in told and ended(event["object"]):
                    told.add(name)
                    notes.write(f"{name} {time.time()}\n")

        # The operator's settings: kopf's own would take hours.
        kopf.run(registry=registry, settings=handlers.settings(), clusterwide=True, standalone=True)


if __name__ == "__main__":
    main()

"""Pods as strict clusters want them: not root, a root file system that cannot be written to, no rights."""

from typing import Any

from cluster.client import Cluster

Object = dict[str, Any]
ZOMBIES = """
import pathlib
states = {p: pathlib.Path(f"/proc/{p}/stat").read_text().rpartition(")")[2].split()[0]
          for p in [d.name for d in pathlib.Path("/proc").iterdir() if d.name.isdigit()]}
print(sum(state == "Z" for state in states.values()))
"""


def pod(name: str, image: str, *, user: int | None = 1000, group: int = 1000, **container: Any) -> Object:
    """``user`` None: the image's own. More for the container: args, command, env, volumeMounts."""
    mounts = [{"name": "tmp", "mountPath": "/tmp"}, *container.pop("volumeMounts", [])]
    volumes = [{"name": "tmp", "emptyDir": {}}, *container.pop("volumes", [])]
    who = {} if user is None else {"runAsUser": user, "runAsGroup": group}
    return {
        "apiVersion": "v1", "kind": "Pod", "metadata": {"name": name},
        "spec": {
            "restartPolicy": "Never", "automountServiceAccountToken": False, "terminationGracePeriodSeconds": 60,
            "securityContext": {"runAsNonRoot": True, "seccompProfile": {"type": "RuntimeDefault"}, **who},
            "containers": [{
                "name": "it", "image": image, "volumeMounts": mounts, **container,
                "securityContext": {
                    "allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]},
                },
            }],
            "volumes": volumes,
        },
    }  # fmt: skip


def until_ended(cluster: Cluster, namespace: str, name: str, timeout: float = 120) -> str:
    """What the pod wrote; it must have succeeded."""

    def ended() -> str | None:
        phase = cluster.get("pod", name, "-n", namespace)["status"].get("phase")
        return phase if phase in ("Succeeded", "Failed") else None

    phase = cluster.wait(ended, timeout, f"pod {name} ends")
    log = cluster.kubectl("logs", name, "-n", namespace)
    assert phase == "Succeeded", log
    return log


def until_running(cluster: Cluster, namespace: str, name: str) -> None:
    def running() -> bool:
        return cluster.get("pod", name, "-n", namespace)["status"].get("phase") == "Running"

    cluster.wait(running, 120, f"pod {name} runs")


def zombies_of_an_orphan(cluster: Cluster, namespace: str, target: str, container: str) -> int:
    """Leave a process whose parent is gone, wait for its end, and count those that nobody has taken in."""
    inside = ["exec", "-n", namespace, target, "-c", container, "--"]
    cluster.kubectl(*inside, "sh", "-c", "(sleep 0.2 &)")
    cluster.kubectl(*inside, "sleep", "1")
    return int(cluster.kubectl(*inside, "python", "-c", ZOMBIES))

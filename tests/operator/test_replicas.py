"""Two replicas under one Lease, killed, frozen, rolled over and cut off at random moments while runs go on.

SEED=N tries another history.
"""

import os
import random
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest
from cluster.client import Cluster
from cluster.proxy import FaultProxy
from driver import ROOT, OperatorProcess, free_port
from ends import watched_ends
from sweep import Scene, plain

SEED = int(os.environ.get("SEED", "1"))
DEEDS = 3 * ("killed", "frozen", "rolled over", "cut off")


@dataclass
class Replica:
    """With a line of its own to the API server."""

    operator: OperatorProcess
    proxy: FaultProxy
    ill_until: float = 0.0
    frozen: bool = False
    deeds: list[str] = field(default_factory=list)

    def does(self, deed: str, seconds: float) -> None:
        process = self.operator.process
        assert process is not None
        self.deeds.append(f"{deed} for {seconds:.1f} s")
        self.ill_until = time.monotonic() + seconds
        if deed == "killed":
            process.kill()
        elif deed == "rolled over":
            process.terminate()
        elif deed == "frozen":
            process.send_signal(signal.SIGSTOP)
            self.frozen = True
        else:
            self.proxy.refuse(path="", times=1_000_000)
            self.proxy.break_streams()

    def tend(self) -> None:
        """What ails it passes; whoever has it run starts it again when it has ended."""
        process = self.operator.process
        assert process is not None
        if time.monotonic() < self.ill_until:
            return
        self.proxy.heal()
        if self.frozen:
            process.send_signal(signal.SIGCONT)
            self.frozen = False
        if process.poll() is not None:
            self.operator.start()


@pytest.fixture
def pair(kwok_cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Replica]]:
    kwok_cluster.define(ROOT / "manifests/base/crd.yaml")
    for name in ("namespace", "rbac"):
        kwok_cluster.apply(ROOT / f"manifests/base/{name}.yaml")
    mine = kwok_cluster.service_account_kubeconfig("alignment-system", "alignment-operator")
    logs = tmp_path_factory.mktemp("replicas")
    with FaultProxy(mine) as one, FaultProxy(mine) as other:
        replicas = [
            Replica(OperatorProcess(proxy.kubeconfig, free_port(), logs / name).start(), proxy)
            for name, proxy in (("one", one), ("other", other))
        ]
        yield replicas
        for replica in replicas:
            replica.operator.stop("kill")


@pytest.mark.soak
def test_two_replicas_at_random_moments(kwok_cluster: Cluster, pair: list[Replica]):
    chance = random.Random(SEED)

    def tend() -> None:
        for replica in pair:
            replica.tend()

    with watched_ends(kwok_cluster) as ends:
        scene = Scene(kwok_cluster, pair[0].proxy, pair[0].operator, ends)
        scene.begin(["undisturbed"])
        scene.finish(["undisturbed"], 120)
        scene.finish(["undisturbed", "none"], 2)  # the last event is told after the last write
        scene.calm = plain(scene.statuses()["undisturbed"], "undisturbed")
        names: list[str] = []
        for number, deed in enumerate(chance.sample(DEEDS, len(DEEDS))):
            names += (new := [f"random-{SEED}-{number}-{i}" for i in range(2)])
            scene.begin(new)
            time.sleep(chance.uniform(0.0, 4.0))
            # Shorter and longer than the Lease holds.
            chance.choice(pair).does(deed, chance.choice([1.0, 8.0, 20.0]))
            scene.finish(new, chance.uniform(1.0, 10.0), tend)
        scene.finish(names, 300, tend)
        told = "; ".join(", ".join(replica.deeds) for replica in pair)
        print(f"seed {SEED}: {told}")
        assert not (wrong := scene.wrong(dict.fromkeys(names, told))), "\n".join(wrong)

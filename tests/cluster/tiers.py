"""What each tier starts, in the keeper's process, and the requests it serves while it runs."""

from pathlib import Path
from typing import Any

from cluster import controllers, controlplane, kwok, machines
from cluster.assets import Assets
from cluster.controlplane import Place
from cluster.network import Network
from cluster.processes import Children, free_ports

Spec = dict[str, Any]


class ApiTier:
    """API server, controllers, Training Operator, Kueue on loopback. No scheduler: pods stay Pending."""

    scheduler = False
    fast = False

    def __init__(self, spec: Spec, assets: Assets, children: Children):
        self.spec, self.assets, self.children = spec, assets, children
        self.place = self._place(Path(spec["state"]))

    def start(self) -> None:
        self.authority = controlplane.make_keys(self.place)
        controlplane.start(self.place, self.assets, self.children, self.scheduler)
        controllers.start(self.place, self.assets, self.children, self.fast)

    def describe(self) -> dict[str, Any]:
        return {"kubeconfig": str(self.place.kubeconfig), "audit_log": str(self.place.audit_log), "nodes": []}

    def serve(self, request: dict[str, str]) -> None:
        raise ValueError(f"this tier serves no request: {request}")

    def _place(self, state: Path) -> Place:
        api, client, peer = free_ports(3)
        return Place(state, "127.0.0.1", api, (client, peer))


class KwokTier(ApiTier):
    """The API tier with a scheduler and fake nodes, whose pods do what their annotations say."""

    scheduler = True
    fast = True

    def start(self) -> None:
        super().start()
        self.nodes = kwok.start(self.place, self.assets, self.children, self.spec["nodes"])

    def describe(self) -> dict[str, Any]:
        return super().describe() | {"nodes": self.nodes}


class NodeTier(ApiTier):
    """Real nodes: kubelet, containerd and kube-proxy in namespaces of their own. Needs root."""

    scheduler = True

    def start(self) -> None:
        network, count = Network(self.spec["slot"]), self.spec["nodes"]
        network.make(count)
        super().start()
        self.machines = machines.Machines(network, self.place, self.assets, self.children, self.authority, count)
        self.machines.start_all()

    def describe(self) -> dict[str, Any]:
        return super().describe() | {"nodes": self.machines.names}

    def serve(self, request: dict[str, str]) -> None:
        actions = {"kill": self.machines.kill, "start": self.machines.start, "load": self.machines.load_image}
        actions[request["action"]](request["argument"])

    def _place(self, state: Path) -> Place:
        network = Network(self.spec["slot"])
        return Place(state, network.address(0), 6443, (2379, 2380), network.enter(0))


TIERS = {"api": ApiTier, "kwok": KwokTier, "node": NodeTier}

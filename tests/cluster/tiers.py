"""What each tier starts, in the keeper's process, and the requests it serves while it runs."""

from collections.abc import Callable
from functools import partial
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
        servers = dict.fromkeys(("etcd", "kube-apiserver"), lambda: controlplane.is_ready(self.place))
        self.ready = servers | controllers.start(self.place, self.assets, self.children, self.fast)

    def describe(self) -> dict[str, Any]:
        return {"kubeconfig": str(self.place.kubeconfig), "audit_log": str(self.place.audit_log), "nodes": []}

    def serve(self, request: dict[str, str]) -> None:
        """Raises KeyError for what this tier cannot do."""
        self.actions()[request["action"]](request["argument"])

    def actions(self) -> dict[str, Callable[[str], None]]:
        save = partial(controlplane.save, self.place, self.children)
        return {"restart": self._restart, "save": save, "restore": self._restore}

    def _restart(self, *names: str) -> None:
        """Killed, and started with what is on their disks."""
        for name in names:
            if name in self.children.running:
                self.children.kill(name)
        for name in names:
            self.children.again(name)
        for name in {*names} & {*self.ready}:
            self.children.wait_for(self.ready[name], 120, f"{name} is ready")
        controllers.unmark()

    def _restore(self, label: str) -> None:
        """With all that have read of what is no more."""
        names = [name for name in self.children.running if name not in ("etcd", "kube-apiserver")]
        for name in [*names, "kube-apiserver"]:
            self.children.kill(name)
        controlplane.restore(self.place, self.children, label)
        self._restart(*names)

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

    def actions(self) -> dict[str, Callable[[str], None]]:
        machines = {"kill": self.machines.kill, "start": self.machines.start, "load": self.machines.load_image}
        return super().actions() | machines

    def _place(self, state: Path) -> Place:
        network = Network(self.spec["slot"])
        return Place(state, network.address(0), 6443, (2379, 2380), network.enter(0))


TIERS = {"api": ApiTier, "kwok": KwokTier, "node": NodeTier}

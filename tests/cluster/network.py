"""The network of one cluster of nodes: a namespace for the control plane and each node, and one with their switch.

The switch is a bridge in a namespace of its own, where no firewall of this machine's reaches it. There is no route from
it to anywhere else, so nothing can leave the machine. A slot keeps the clusters of one machine apart: slot 0 is that of
`make cluster-up`, tests take the next that is free.
"""

import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cluster.controlplane import SERVICES
from cluster.processes import wait_for

SLOTS = 8
_NAMESPACES = Path("/run/netns")
_BRIDGE = "switch"


@dataclass(frozen=True)
class Network:
    """Names and addresses of a slot. Number 0 is the control plane, 1, 2, ... are the nodes."""

    slot: int

    @property
    def name(self) -> str:
        """Of the host's end of its cable to the switch, and of the nodes' control groups."""
        return f"alncluster{self.slot}"

    @property
    def switch(self) -> str:
        return f"aln{self.slot}-switch"

    @property
    def host(self) -> str:
        return f"10.254.{self.slot}.1"

    @property
    def all_pods(self) -> str:
        return f"10.{240 + self.slot}.0.0/16"

    def namespace(self, number: int) -> str:
        return f"aln{self.slot}-{number}"

    def address(self, number: int) -> str:
        return f"10.254.{self.slot}.{10 + number}"

    def pods(self, number: int) -> str:
        return f"10.{240 + self.slot}.{number}.0/24"

    def enter(self, number: int) -> Sequence[str]:
        # Not `ip netns exec`: that remounts /sys and hides the cgroups.
        return ("nsenter", f"--net={_NAMESPACES / self.namespace(number)}")

    def make(self, nodes: int) -> None:
        _ip("netns", "add", self.switch)
        _ip("-n", self.switch, "link", "add", _BRIDGE, "type", "bridge")
        _ip("-n", self.switch, "link", "set", _BRIDGE, "up")
        _ip("link", "add", self.name, "type", "veth", "peer", "name", "host", "netns", self.switch)
        _ip("-n", self.switch, "link", "set", "host", "master", _BRIDGE, "up")
        _ip("addr", "add", f"{self.host}/24", "dev", self.name)
        _ip("link", "set", self.name, "up")
        for number in range(nodes + 1):
            self.add(number, nodes)
        for number in range(1, nodes + 1):
            _ip("route", "add", self.pods(number), "via", self.address(number), "dev", self.name)

    def add(self, number: int, nodes: int) -> None:
        """The namespace of one machine among ``nodes``."""
        name = self.namespace(number)
        _ip("netns", "add", name)
        _ip("-n", self.switch, "link", "add", name, "type", "veth", "peer", "name", "eth0", "netns", name)
        _ip("-n", self.switch, "link", "set", name, "master", _BRIDGE, "up")
        for command in (
            ("link", "set", "lo", "up"),
            ("addr", "add", f"{self.address(number)}/24", "dev", "eth0"),
            ("link", "set", "eth0", "up"),
            ("route", "add", SERVICES, "dev", "eth0"),
            *(("route", "add", self.pods(n), "via", self.address(n)) for n in range(1, nodes + 1) if n != number),
        ):
            _ip("-n", name, *command)

    def cut(self, number: int) -> None:
        """Its cable: nothing that its processes send at their end reaches anybody."""
        _ip("-n", self.switch, "link", "del", self.namespace(number), check=False)

    def remove_one(self, number: int) -> None:
        # The kernel takes a namespace apart some time later; its cable's name is wanted again before that.
        self.cut(number)
        _remove_namespace(self.namespace(number))

    def remove(self) -> None:
        """Safe to call twice, and when there is nothing."""
        _ip("link", "del", self.name, check=False)
        for path in sorted(_NAMESPACES.glob(f"aln{self.slot}-*")):
            _remove_namespace(path.name)


def _remove_namespace(name: str) -> None:
    def empty() -> bool:
        pids = _ip("netns", "pids", name, check=False).split()
        if pids:
            subprocess.run(["kill", "-KILL", *pids], check=False, capture_output=True)
        return not pids

    wait_for(empty, 20, f"the processes in {name} end")
    _ip("netns", "del", name)


def _ip(*arguments: str, check: bool = True) -> str:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True, check=False)
    if check and done.returncode:
        raise RuntimeError(f"ip {' '.join(arguments)}: {done.stderr.strip()}")
    return done.stdout

"""Nodes: each a process tree in network, mount and PID namespaces of its own, joined by one bridge.

There is no route from the bridge to anywhere else, so nothing can leave the machine. Killing the first process of a
node ends it with all its containers, as pulling a plug would.
"""

import os
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

from cluster import pki
from cluster.assets import HERE, Assets
from cluster.controlplane import SERVICES, Place
from cluster.processes import Children, wait_for

BRIDGE = "alncluster"
CGROUP = "alncluster"
HOST, CONTROL = "10.254.0.1", "10.254.0.2"


def namespace(number: int) -> str:
    """0 is the control plane's."""
    return f"aln-{number}"


def address(number: int) -> str:
    return f"10.254.0.{10 + number}" if number else CONTROL


def pods(number: int) -> str:
    return f"10.244.{number}.0/24"


def enter(number: int) -> Sequence[str]:
    # Not `ip netns exec`: that remounts /sys and hides the cgroups.
    return ("nsenter", f"--net=/run/netns/{namespace(number)}")


def make_network(nodes: int) -> None:
    _ip("link", "add", BRIDGE, "type", "bridge")
    _ip("addr", "add", f"{HOST}/24", "dev", BRIDGE)
    _ip("link", "set", BRIDGE, "up")
    for number in range(nodes + 1):
        make_namespace(number, nodes)
    for number in range(1, nodes + 1):
        _ip("route", "add", pods(number), "via", address(number), "dev", BRIDGE)


def make_namespace(number: int, nodes: int) -> None:
    name = namespace(number)
    _ip("netns", "add", name)
    _ip("link", "add", name, "type", "veth", "peer", "name", "eth0", "netns", name)
    _ip("link", "set", name, "master", BRIDGE, "up")
    for command in (
        ("link", "set", "lo", "up"),
        ("addr", "add", f"{address(number)}/24", "dev", "eth0"),
        ("link", "set", "eth0", "up"),
        ("route", "add", SERVICES, "dev", "eth0"),
        *(("route", "add", pods(n), "via", address(n)) for n in range(1, nodes + 1) if n != number),
    ):
        _ip("-n", name, *command)


class Machines:
    """The nodes of one cluster, by name: node-1, node-2, ..."""

    def __init__(self, place: Place, assets: Assets, children: Children, authority: pki.Authority, count: int):
        self.place, self.assets, self.children, self.count = place, assets, children, count
        self.names = [f"node-{number}" for number in range(1, count + 1)]
        for number, name in enumerate(self.names, 1):
            subject = f"/O=system:nodes/CN=system:node:{name}"
            authority.sign(name, subject, f"DNS:{name}", f"IP:{address(number)}")
            authority.kubeconfig(name, place.url, place.component_kubeconfig(name))

    def start_all(self) -> None:
        images = self.place.state / "images"
        images.mkdir()
        for name in ("pause", "python"):
            os.symlink(self.assets.image(name), images / f"{name}.tar")
        self._start_dns()
        for number, name in enumerate(self.names, 1):
            self._run(name, number)
        for name in self.names:
            self.children.wait_for(lambda name=name: self.is_ready(name), 120, f"{name} is Ready")

    def start(self, name: str) -> None:
        if name in self.children.running:
            raise ValueError(f"{name} runs already")
        number = self.names.index(name) + 1
        make_namespace(number, self.count)
        self._run(name, number)

    def kill(self, name: str) -> None:
        """Like a loss of power: the disk stays, everything else is gone."""
        number = self.names.index(name) + 1
        self.children.kill(name)
        remove_namespace(namespace(number))
        remove_cgroups(name)

    def load_image(self, archive: str) -> None:
        """Into every node, and into those started later."""
        target = self.place.state / "images" / Path(archive).name
        if target != Path(archive):
            target.unlink(missing_ok=True)
            target.symlink_to(Path(archive).resolve())
        running = [name for name in self.names if name in self.children.running]
        imports = [subprocess.Popen(self._import(name, target), stderr=subprocess.PIPE) for name in running]
        for process in imports:
            _, errors = process.communicate()
            if process.returncode:
                raise RuntimeError(f"{archive} could not be loaded: {errors.decode()}")

    def is_ready(self, name: str) -> bool:
        query = "{.status.conditions[?(@.type=='Ready')].status}"
        command = [self.assets.binary("kubectl"), f"--kubeconfig={self.place.kubeconfig}", "get", "node", name]
        done = subprocess.run([*command, f"-o=jsonpath={query}"], capture_output=True, text=True, check=False)
        return done.stdout == "True"

    def _run(self, name: str, number: int) -> None:
        environment = {
            "NODE": name, "ADDRESS": address(number), "PODS": pods(number), "DNS": CONTROL,
            "STATE": str(self.place.state), "BIN": str(self.assets.root / "bin"), "CGROUP": CGROUP,
        }  # fmt: skip
        isolated = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "bash", str(HERE / "node.sh")]
        self.children.start(name, [*enter(number), *isolated], environment)

    def _import(self, name: str, archive: Path) -> list[str]:
        outer = self.children.running[name].pid
        first = Path(f"/proc/{outer}/task/{outer}/children").read_text().split()[0]
        return ["nsenter", "-t", first, "--mount", "ctr", "-n", "k8s.io", "images", "import", str(archive)]

    def _start_dns(self) -> None:
        keys = self.place.keys
        corefile = self.place.state / "Corefile"
        corefile.write_text(
            f".:53 {{\n  bind {CONTROL}\n  errors\n  kubernetes cluster.local in-addr.arpa {{\n"
            f"    endpoint {self.place.url}\n    tls {keys}/admin.crt {keys}/admin.key {keys}/ca.crt\n  }}\n}}\n"
        )
        self.children.start("coredns", [*self.place.enter, self.assets.binary("coredns"), "-conf", corefile])


def remove_all() -> None:
    """Everything that outlives the processes. Safe to call twice, and when there is nothing."""
    for name in _namespaces():
        remove_namespace(name)
    _ip("link", "del", BRIDGE, check=False)
    remove_cgroups("")


def remove_namespace(name: str) -> None:
    def empty() -> bool:
        pids = _ip("netns", "pids", name, check=False).split()
        for pid in pids:
            subprocess.run(["kill", "-KILL", pid], check=False, capture_output=True)
        return not pids

    wait_for(empty, 20, f"the processes in {name} end")
    _ip("netns", "del", name)


def remove_cgroups(below: str) -> None:
    deadline = time.monotonic() + 10
    while folders := [f for f in Path("/sys/fs/cgroup").glob(f"*/{CGROUP}/{below}") if f.exists()] or (
        [f for f in [Path("/sys/fs/cgroup") / CGROUP / below] if f.exists()]
    ):
        for folder in folders:
            subprocess.run(
                ["find", str(folder), "-depth", "-type", "d", "-exec", "rmdir", "{}", "+"],
                check=False,
                capture_output=True,
            )
        if time.monotonic() > deadline:
            raise TimeoutError(f"cgroups are still in use: {folders}")
        time.sleep(0.05)


def _namespaces() -> list[str]:
    if not Path("/run/netns").exists():
        return []
    return sorted(path.name for path in Path("/run/netns").glob("aln-*"))


def _ip(*arguments: str, check: bool = True) -> str:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True, check=False)
    if check and done.returncode:
        raise RuntimeError(f"ip {' '.join(arguments)}: {done.stderr.strip()}")
    return done.stdout

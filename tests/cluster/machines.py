"""Nodes: each a process tree in network, mount and PID namespaces of its own.

Killing the first process of a node ends it with all its containers, as pulling a plug would.
"""

import shutil
import subprocess
from pathlib import Path

from cluster import pki
from cluster.assets import HERE, Assets
from cluster.controlplane import Place, kubectl
from cluster.network import Network
from cluster.processes import Children, wait_for

_CGROUPS = Path("/sys/fs/cgroup")
_WATCHERS = 1024


class Machines:
    """The nodes of one cluster, by name: node-1, node-2, ..."""

    def __init__(
        self, network: Network, place: Place, assets: Assets, children: Children, authority: pki.Authority, count: int
    ):
        self.network, self.place, self.assets, self.children, self.count = network, place, assets, children, count
        self.names = [f"node-{number}" for number in range(1, count + 1)]
        for number, name in enumerate(self.names, 1):
            subject = f"/O=system:nodes/CN=system:node:{name}"
            authority.sign(name, subject, f"DNS:{name}", f"IP:{network.address(number)}")
            authority.kubeconfig(name, place.url, place.component_kubeconfig(name))

    def start_all(self) -> None:
        """Returns when every node is Ready."""
        _allow_watches()
        images = self.place.state / "images"
        images.mkdir()
        for name in ("pause", "python"):
            (images / f"{name}.tar").symlink_to(self.assets.image(name))
        self._start_dns()
        for name in self.names:
            self._run(name)
        for name in self.names:
            self.children.wait_for(lambda name=name: self._is_ready(name), 120, f"{name} is Ready")

    def start(self, name: str) -> None:
        if name in self.children.running:
            raise ValueError(f"{name} runs already")
        self.network.add(self._number(name), self.count)
        self._run(name)

    def kill(self, name: str) -> None:
        """Like a loss of power: the disk stays, everything else is gone, without a last word to anybody."""
        self.network.cut(self._number(name))
        self.children.kill(name)
        self.network.remove_one(self._number(name))
        remove_cgroups(f"{self.network.name}/{name}")

    def load_image(self, archive: str) -> None:
        """Into every node, and into those started later."""
        target = self.place.state / "images" / Path(archive).name
        if target != Path(archive):
            shutil.copyfile(archive, target)
        running = [name for name in self.names if name in self.children.running]
        imports = [subprocess.Popen(self._import(name, target), stderr=subprocess.PIPE) for name in running]
        for process in imports:
            _, errors = process.communicate()
            if process.returncode:
                raise RuntimeError(f"{archive} could not be loaded: {errors.decode()}")

    def _number(self, name: str) -> int:
        return self.names.index(name) + 1

    def _is_ready(self, name: str) -> bool:
        query = "-o=jsonpath={.items[*].status.conditions[?(@.type=='Ready')].status}"
        selected = f"--field-selector=metadata.name={name}"
        return kubectl(self.place, self.assets, "get", "nodes", selected, query) == "True"

    def _run(self, name: str) -> None:
        number, network = self._number(name), self.network
        environment = {
            "NODE": name, "ADDRESS": network.address(number), "PODS": network.pods(number),
            "ALL_PODS": network.all_pods, "DNS": network.address(0), "CGROUP": network.name,
            "STATE": str(self.place.state), "BIN": str(self.assets.root / "bin"),
        }  # fmt: skip
        isolated = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "bash", str(HERE / "node.sh")]
        self.children.start(name, [*network.enter(number), *isolated], environment)

    def _import(self, name: str, archive: Path) -> list[str]:
        outer = self.children.running[name].pid
        first = Path(f"/proc/{outer}/task/{outer}/children").read_text().split()[0]
        return ["nsenter", "-t", first, "--mount", "ctr", "-n", "k8s.io", "images", "import", str(archive)]

    def _start_dns(self) -> None:
        keys = self.place.keys
        corefile = self.place.state / "Corefile"
        corefile.write_text(
            f".:53 {{\n  bind {self.network.address(0)}\n  errors\n  kubernetes cluster.local in-addr.arpa {{\n"
            f"    endpoint {self.place.url}\n    tls {keys}/admin.crt {keys}/admin.key {keys}/ca.crt\n  }}\n}}\n"
        )
        self.children.start("coredns", [*self.place.enter, self.assets.binary("coredns"), "-conf", corefile])


def _allow_watches() -> None:
    """A cluster of two nodes takes about 30, and the kernel's own limit for all of root's is 128. Only ever raised."""
    limit = Path("/proc/sys/fs/inotify/max_user_instances")
    if int(limit.read_text()) < _WATCHERS:
        limit.write_text(str(_WATCHERS))


def remove_cgroups(name: str) -> None:
    """Safe to call twice. A group can only go when the kernel has taken its last process away."""

    def gone() -> bool:
        folders = [folder for folder in (_CGROUPS / name, *_CGROUPS.glob(f"*/{name}")) if folder.exists()]
        for folder in folders:
            find = ["find", str(folder), "-depth", "-type", "d", "-exec", "rmdir", "{}", "+"]
            subprocess.run(find, check=False, capture_output=True)
        return not folders

    wait_for(gone, 20, f"the control groups {name} go away", every=0.05)

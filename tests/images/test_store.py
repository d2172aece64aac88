"""Where images are built: what a killed build leaves."""

import os
import subprocess
import sys
from pathlib import Path

from cluster import buildah
from cluster.client import Cluster
from cluster.processes import wait_for

BUILD = """
import sys
from pathlib import Path
from cluster import buildah
with buildah.store("killed", Path(sys.argv[1]), []) as store:
    store.run("from", "--name=it", buildah.BASE)
    store.run("run", "it", "--", "sleep", sys.argv[2])
"""


def test_a_killed_build_leaves_nothing(node_cluster: Cluster, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    base, seconds = node_cluster.state / "images" / "python.tar", str(100000 + os.getpid())
    build = subprocess.Popen(
        [sys.executable, "-c", BUILD, str(base), seconds],
        env=os.environ | {"PYTHONPATH": str(Path(buildah.__file__).parents[1])},
    )
    try:
        wait_for(lambda: sleeping(seconds), 60, "the build is in the middle of a step")
    finally:
        build.kill()
        build.wait()
    wait_for(lambda: not sleeping(seconds), 10, "the step ends with the build")
    assert str(tmp_path) not in Path("/proc/mounts").read_text()
    with buildah.store("killed", base, []) as store:
        assert store.run("containers", "--quiet") == ""
        assert buildah.BASE.partition(":")[0] in store.run("images")


def sleeping(seconds: str) -> list[int]:
    """Processes of that step, in whatever namespace."""
    wanted = b"/usr/bin/sleep\0" + seconds.encode()
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if (folder / "cmdline").read_bytes().startswith(wanted):
                found.append(int(folder.name))
        except OSError:
            continue
    return found

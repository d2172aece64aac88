"""Two machines of which each loses the other: here, processes in a network of their own that stops carrying anything.

Their connection stays, as one to a machine without power does; one that is closed would be noticed at once.
"""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
from cluster.requirements import not_here

from trainers.contract import FAILURES, FailureClass

PORT = 29500
SCENE = """
set -e
ip link set lo up
for node in 0 1; do ALIGNMENT_TERMINATION_LOG=word-$node "$@" & done
until [ -e at-work-0 ] && [ -e at-work-1 ] && ss -Htn state established "sport = $PORT" | grep -q .; do sleep 0.2; done
sleep 1
ip link set lo down
touch cut
for job in $(jobs -p); do wait $job || echo $?; done
"""
ALONE = ["unshare", "--map-root-user", "--net", "--pid", "--fork", "--kill-child"]
CODE = FAILURES[FailureClass.INFRASTRUCTURE].code
WORK = """
import pathlib, sys, time
pathlib.Path(f"at-work-{sys.argv[1]}").touch()
time.sleep(600)
"""
WATCH = f"""
import os, sys
from pathlib import Path
from trainers.nodes import watch
node = int(sys.argv[1])
def lost(other):
    Path(f"word-{{node}}").write_text(f"{{other}}")
    os._exit({CODE})
watch(node, "127.0.0.1", {PORT}, lost)
"""


@pytest.fixture
def scene(tmp_path):
    """``scene(command)``: it is run twice, as `$node` 0 and 1, until both lose each other; what both have left in the end."""
    if subprocess.run([*ALONE, "true"], capture_output=True, check=False).returncode:
        not_here("this system lets nobody have a network of his own")

    def play(command: str, port: int) -> list[str]:
        environment = ["env", f"PYTHON={sys.executable}", f"PORT={port}"]
        shell = ["bash", "-c", SCENE.replace('"$@"', command)]
        printed = subprocess.run(
            [*ALONE, *environment, *shell], cwd=tmp_path, stdout=subprocess.PIPE, text=True, check=True
        )
        took = time.time() - (tmp_path / "cut").stat().st_mtime
        assert printed.stdout.split() == [str(CODE)] * 2
        assert took < 30
        return [(tmp_path / f"word-{node}").read_text() for node in (0, 1)]

    return play


def test_each_node_is_told_that_the_other_one_is_silent(scene, tmp_path: Path):
    (tmp_path / "watch.py").write_text(WATCH + WORK)
    assert scene('"$PYTHON" watch.py $node', PORT) == ["1", "0"]


@pytest.mark.distributed
def test_launchers_end_their_processes_and_name_the_other_node(scene, tmp_path: Path):
    (tmp_path / "work.py").write_text(WORK)
    launcher = '"$PYTHON" -m trainers.agent --nnodes=2 --nproc-per-node=1 --master-addr=127.0.0.1'
    words = scene(f"{launcher} --master-port={PORT - 1} --node-rank=$node work.py $node", PORT)
    for said, other in zip(map(json.loads, words), (1, 0), strict=True):
        assert said["message"] == f"node rank {other} has not answered for 15 s: its power or its network is gone"
        assert (said["failure"], said["seen"], said["lostNode"]) == ("Infrastructure", True, other)

"""Keeps one cluster: `python -m cluster.keeper SPEC` starts it, holds it, and takes everything away at the end.

Two processes. The inner one starts the servers and serves requests; every server dies with it. The outer one does
nothing but wait for it, for SIGTERM, or for the end of its own parent, and then cleans up. So nothing is left when
the owner, or either of the two, is killed; what a kill of both at once leaves, the next start removes.
"""

import json
import os
import shutil
import signal
import socket
import sys
import time
import traceback
from contextlib import suppress
from pathlib import Path

from cluster.assets import locate
from cluster.machines import remove_cgroups
from cluster.network import Network
from cluster.processes import Children, die_with_parent
from cluster.tiers import TIERS, ApiTier, Spec

READY, FAILED, DETACHED, CONTROL, LOCK = "ready.json", "failed.txt", "detached", "control", "lock"


def main() -> None:
    spec: Spec = json.loads(sys.argv[1])
    owner = os.getppid()
    asked: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _: asked.append(number))
    inner = os.fork()
    if inner == 0:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        die_with_parent()
        _keep(spec)
    _watch(inner, owner, asked, Path(spec["state"]))
    clean_up(spec)


def _watch(inner: int, owner: int, asked: list[int], state: Path) -> None:
    """Returns when the inner process has ended, which it does at SIGTERM or when the owner of an owned cluster ends."""
    while os.waitpid(inner, os.WNOHANG) == (0, 0):
        if asked or (os.getppid() != owner and not (state / DETACHED).exists()):
            os.kill(inner, signal.SIGKILL)
        time.sleep(0.1)


def _keep(spec: Spec) -> None:
    state = Path(spec["state"])
    children = Children(state / "logs")
    tier = TIERS[spec["tier"]](spec, locate(), children)
    try:
        tier.start()
        _publish(state / READY, json.dumps(tier.describe()))
    except Exception as error:
        traceback.print_exc()
        # The owner reads this and the logs before it ends this process.
        _publish(state / FAILED, f"{type(error).__name__}: {error}")
        signal.pause()
    _serve(state, tier, children)


def _serve(state: Path, tier: ApiTier, children: Children) -> None:
    reported: set[str] = set()
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(state / CONTROL))
        server.listen()
        server.settimeout(0.5)
        while True:
            with suppress(TimeoutError):
                _answer(server.accept()[0], tier)
            for name in set(children.ended()) - reported:
                print(f"{name} ended by itself:\n{children.tail(name)}", flush=True)
                reported.add(name)


def _answer(connection: socket.socket, tier: ApiTier) -> None:
    with connection, connection.makefile("rw") as stream:
        try:
            tier.serve(json.loads(stream.readline()))
            answer = {}
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        stream.write(json.dumps(answer) + "\n")


def clean_up(spec: Spec) -> None:
    if spec["tier"] == "node":
        network = Network(spec["slot"])
        network.remove()
        remove_cgroups(network.name)
    shutil.rmtree(spec["state"], ignore_errors=True)


def _publish(path: Path, text: str) -> None:
    part = path.with_suffix(".part")
    part.write_text(text)
    part.replace(path)


if __name__ == "__main__":
    main()

"""The peers' environment: torch and the rest from this project's locks, and each release of TRL in a folder beside it.

PPO has left TRL; the last release that has it is a peer of its own. All is installed once, outside of the tree.
"""

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

LOCKS = Path(__file__).parents[2] / "requirements"
HOME = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "alignment-peers"
PEERS = {"trl": "peers.lock", "trl-ppo": "peers-ppo.lock"}
WHOLE = "whole"


def installed() -> Path:
    """The folder with the environment and the peers in it."""
    locks = [LOCKS / name for name in ("torch.lock", "runtime.lock", *PEERS.values())]
    mark = hashlib.sha256(b"".join(lock.read_bytes() for lock in locks) + sys.version.encode()).hexdigest()[:12]
    folder = HOME / mark
    HOME.mkdir(parents=True, exist_ok=True)
    with (HOME / f"{mark}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / WHOLE).exists():
            print(
                f"Installing TRL into {folder}: torch with CUDA is 4.7 GB on disk, and is not downloaded twice.",
                flush=True,
            )
            _install(folder)
    return folder


def _install(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    _uv(folder, "venv", "--quiet", "--python", sys.executable, str(folder))
    for lock in ("torch.lock", "runtime.lock"):
        _uv(folder, *_locked(lock))
    for name, lock in PEERS.items():
        _uv(folder, *_locked(lock), "--target", str(folder / name))
    (folder / WHOLE).touch()


def _locked(lock: str) -> list[str]:
    return ["pip", "install", "--quiet", "--no-deps", "--require-hashes", "-r", str(LOCKS / lock)]


def _uv(folder: Path, *command: str) -> None:
    uv = shutil.which("uv", path=str(Path(sys.executable).parent)) or shutil.which("uv")
    if uv is None:
        sys.exit("there is no uv to install the peers with: make bench has it")
    subprocess.run([uv, *command], env={**os.environ, "VIRTUAL_ENV": str(folder), "UV_HTTP_TIMEOUT": "300"}, check=True)


def versions(folder: Path) -> dict[str, str]:
    """Releases of the peers, as their folders say."""
    return {
        name: next((folder / name).glob("trl-*.dist-info")).name.split("-")[1].removesuffix(".dist") for name in PEERS
    }

"""Images from Dockerfiles, built by `make images` with buildah into a store of the tests' own.

Each buildah is process 1 of its own mount and PID namespaces: nothing of it runs or stays mounted when it ends, however
it ends, and it ends with the process that asked for it.
"""

import hashlib
import json
import os
import shutil
import subprocess
import tarfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.assets import cache_home
from cluster.build import CannotBuild
from cluster.locks import exclusive
from cluster.processes import die_with_parent

ROOT = Path(__file__).parents[2]
_ALONE = ("unshare", "--mount", "--propagation", "private", "--pid", "--fork", "--kill-child", "--mount-proc")
BASE = "localhost/local/python:1"


@dataclass(frozen=True)
class Store:
    """Layers and images below one folder; what was built is not built again. Made by `store`."""

    folder: Path

    def build(self, what: str, name: str, flags: str = "", tree: Path = ROOT, **variables: str) -> None:
        """`make operator-image` or `trainer-image`, from a tree. Keeps layers, and of each name the newest image."""
        before = self._identity(name)
        bundle = Path(os.environ.get("SSL_CERT_FILE", "/etc/ssl/certs/ca-certificates.crt"))
        variables |= {
            "BUILDER": " ".join(self._buildah), "BUILD_FLAGS": f"--pull-never {flags}", "BASE_IMAGE": BASE,
            "TAG": name.partition(":")[2], **({"CA_BUNDLE": str(bundle)} if bundle.exists() else {}),
        }  # fmt: skip
        self._alone(
            "make", f"--directory={tree}", f"{what}-image", *(f"{key}={value}" for key, value in variables.items())
        )
        if before not in ("", self._identity(name)):
            self.run("rmi", before)

    def export(self, name: str, out: Path) -> Path:
        """As an archive that containerd imports."""
        out.parent.mkdir(parents=True, exist_ok=True)
        out.unlink(missing_ok=True)
        self.run("push", "--quiet", name, f"docker-archive:{out}:{name}")
        return out

    def config(self, name: str) -> dict[str, Any]:
        """What the image says of how it starts: Entrypoint, Env, Labels, User."""
        return json.loads(self.run("inspect", "--type=image", name))["OCIv1"]["config"]

    def history(self, name: str) -> str:
        return json.dumps(json.loads(self.run("inspect", "--type=image", name))["OCIv1"]["history"])

    def run(self, *arguments: str) -> str:
        """buildah's output. Raises CannotBuild."""
        return self._alone(*self._buildah, *arguments)

    @property
    def _buildah(self) -> tuple[str, ...]:
        return ("buildah", f"--root={self.folder}/images", f"--runroot={self.folder}/run")

    def _alone(self, *command: str) -> str:
        environment = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
        # runc and crun want control groups that a container often may not make.
        environment |= {"BUILDAH_ISOLATION": "chroot"}
        done = subprocess.run(
            [*_ALONE, *command], cwd=ROOT, env=environment, capture_output=True, text=True, check=False,
            preexec_fn=die_with_parent,
        )  # fmt: skip
        if done.returncode:
            raise CannotBuild(f"{command[0]} failed: {(done.stdout + done.stderr)[-3000:]}")
        return done.stdout

    def _identity(self, name: str) -> str:
        return self.run("images", "--quiet", "--no-trunc", "--filter", f"reference={name}").strip()


@contextmanager
def store(name: str, base: Path, locks: Sequence[str]) -> Iterator[Store]:
    """For one process at a time. Begins anew when ``base`` or one of ``locks`` has changed, so it does not grow for ever.

    ``base`` is the archive of `local/python:1`, which stands in for the public image.
    """
    folder = cache_home() / "containers" / name
    with exclusive(folder.with_suffix(".lock"), "another process is building an image; waiting for it"):
        found = Store(folder)
        mark, wanted = folder / "base", _key(base, locks)
        if not mark.exists() or mark.read_text() != wanted:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            found.run("pull", "--quiet", f"docker-archive:{base}")
            mark.write_text(wanted)
        found.run("rm", "--all")  # what a build that was killed left
        yield found


def _key(base: Path, locks: Sequence[str]) -> str:
    with tarfile.open(base) as archive:
        digest = hashlib.sha256(archive.extractfile("manifest.json").read())  # type: ignore[union-attr]
    for lock in locks:
        digest.update((ROOT / "requirements" / f"{lock}.lock").read_bytes())
    return digest.hexdigest()

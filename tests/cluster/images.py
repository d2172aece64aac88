"""Image archives from folders, without a daemon or a registry.

`write_image` makes an archive of a base's layers and one layer per folder; `ensure_bases` makes the two bases:
`local/pause:1` and `local/python:1` (Debian with the Python that runs this).
"""

import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.assets import HERE, Assets
from cluster.build import CannotBuild, Say, announce
from cluster.locks import exclusive

# Debian's release with each Python: what a virtual environment holds must fit the image's interpreter.
RELEASES = {(3, 11): "bookworm", (3, 13): "trixie"}
_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_UNWANTED = ("var/cache/apt/archives", "var/lib/apt/lists", "usr/share/doc", "usr/share/man", "usr/share/locale")


@dataclass(frozen=True)
class Layer:
    """A folder that appears at ``target`` in the image, less what matches ``exclude`` (names, anywhere below)."""

    folder: Path
    target: str = "/"
    exclude: Sequence[str] = ("__pycache__", ".git", ".venv")


@dataclass(frozen=True)
class _Blob:
    digest: str
    data: bytes


def write_image(
    name: str, layers: Iterable[Layer], out: Path, base: Path | None = None, *,
    user: str = "", env: Mapping[str, str] | None = None, entrypoint: Sequence[str] = (), command: Sequence[str] = (),
    workdir: str = "",
) -> Path:  # fmt: skip
    """``name`` with its tag, such as alignment-trainer:test. Equal inputs give equal bytes.

    Without ``env``, ``entrypoint`` and so on those of the base hold; ``env`` adds to the base's.
    """
    config, blobs = _read_image(base) if base else ({"Env": [f"PATH={_PATH}"]}, [])
    blobs += [_pack(layer) for layer in layers]
    merged = dict(variable.split("=", 1) for variable in config.get("Env", [])) | dict(env or {})
    config |= {"Env": [f"{key}={value}" for key, value in merged.items()]}
    for key, value in (
        ("User", user),
        ("Entrypoint", list(entrypoint)),
        ("Cmd", list(command)),
        ("WorkingDir", workdir),
    ):
        if value:
            config[key] = value
    return _write_archive(name, config, blobs, out)


def ensure_bases(assets: Assets, say: Say = announce) -> None:
    """Makes what is missing of `pause` and `python`, once; about a minute and a download of 60 MB."""
    if all(assets.image(name).exists() for name in ("pause", "python")):
        return
    if assets.given:
        raise CannotBuild(f"{assets.root} lacks images/pause.tar or images/python.tar")
    with exclusive(assets.root / "images.lock", "another process is making the images; waiting for it", say):
        for name, fill, command in (("pause", _fill_pause, ["/pause"]), ("python", _fill_python, ["python3"])):
            if not assets.image(name).exists():
                say(f"making the image local/{name}:1, once")
                _make_base(name, fill, command, assets.image(name))


def _make_base(name: str, fill: Callable[[Path], None], command: list[str], out: Path) -> None:
    with tempfile.TemporaryDirectory(prefix="alignment-image-") as folder:
        fill(Path(folder))
        write_image(f"local/{name}:1", [Layer(Path(folder), exclude=())], out, command=command)


def _fill_pause(folder: Path) -> None:
    _run("gcc", "-Os", "-static", "-s", "-o", str(folder / "pause"), str(HERE / "pause.c"))


def _fill_python(folder: Path) -> None:
    release = RELEASES.get(sys.version_info[:2])
    if not release:
        raise CannotBuild(f"no Debian release has Python {sys.version.split()[0]}; use one of {sorted(RELEASES)}")
    _run("debootstrap", "--variant=minbase", "--include=python3,ca-certificates,libgomp1", release, str(folder))
    for unwanted in _UNWANTED:
        shutil.rmtree(folder / unwanted, ignore_errors=True)
    (folder / "usr/bin/python").symlink_to("python3")


def _run(*command: str) -> None:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if done.returncode:
        raise CannotBuild(f"{command[0]} failed: {done.stdout[-2000:]}")


def _pack(layer: Layer) -> _Blob:
    def normal(info: tarfile.TarInfo) -> tarfile.TarInfo | None:
        if Path(info.name).name in layer.exclude:
            return None
        info.uid = info.gid = info.mtime = 0
        info.uname = info.gname = "root"
        # Containers run as a user that the folder's owner knows nothing of.
        info.mode |= 0o555 if info.isdir() or info.mode & 0o100 else 0o444
        return info

    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        tar.add(layer.folder, arcname=layer.target.strip("/") or ".", filter=normal)
    return _Blob(hashlib.sha256(buffer.getvalue()).hexdigest(), buffer.getvalue())


def _read_image(archive: Path) -> tuple[dict[str, Any], list[_Blob]]:
    with tarfile.open(archive) as tar:

        def content(name: str) -> bytes:
            return tar.extractfile(name).read()  # type: ignore[union-attr]

        manifest = json.loads(content("manifest.json"))[0]
        config = json.loads(content(manifest["Config"]))["config"]
        return config, [_Blob(name.split("/")[0], content(name)) for name in manifest["Layers"]]


def _write_archive(name: str, config: dict[str, Any], blobs: list[_Blob], out: Path) -> Path:
    document = {
        "architecture": _architecture(), "os": "linux", "config": config,
        "rootfs": {"type": "layers", "diff_ids": [f"sha256:{blob.digest}" for blob in blobs]},
        "history": [{"created_by": "write_image"} for _ in blobs],
    }  # fmt: skip
    encoded = json.dumps(document).encode()
    config_name = f"{hashlib.sha256(encoded).hexdigest()}.json"
    files = {config_name: encoded} | {f"{blob.digest}/layer.tar": blob.data for blob in blobs}
    manifest = [{"Config": config_name, "RepoTags": [name], "Layers": [n for n in files if n.endswith("layer.tar")]}]
    out.parent.mkdir(parents=True, exist_ok=True)
    part = out.with_name(f"{out.name}.{os.getpid()}")
    with tarfile.open(part, "w") as tar:
        for path, data in {**files, "manifest.json": json.dumps(manifest).encode()}.items():
            info = tarfile.TarInfo(path)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    part.replace(out)
    return out


def _architecture() -> str:
    return {"x86_64": "amd64", "aarch64": "arm64"}[os.uname().machine]

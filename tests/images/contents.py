"""What is in an image's archive: the file system that its layers make, and what it says of how it starts."""

import json
import stat
import tarfile
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any


@dataclass(frozen=True)
class Image:
    """Paths are relative to the root, without a slash in front."""

    config: dict[str, Any]
    history: str
    files: dict[str, tarfile.TarInfo]

    @classmethod
    def read(cls, archive: Path) -> "Image":
        with tarfile.open(archive) as tar:
            manifest = json.load(tar.extractfile("manifest.json"))[0]  # type: ignore[arg-type]
            document = json.load(tar.extractfile(manifest["Config"]))  # type: ignore[arg-type]
            files: dict[str, tarfile.TarInfo] = {}
            for layer in manifest["Layers"]:
                with tarfile.open(fileobj=tar.extractfile(layer)) as content:
                    _put_over(files, content)
        return cls(document["config"], json.dumps(document["history"]), files)

    def named(self, *names: str) -> list[str]:
        return [path for path in self.files if PurePosixPath(path).name in names]

    def below(self, *folders: str) -> dict[str, tarfile.TarInfo]:
        found = {path: file for path, file in self.files.items() if path.startswith(tuple(f"{f}/" for f in folders))}
        assert found, folders
        return found

    def size(self, *folders: str) -> int:
        return sum(file.size for file in self.below(*folders).values())


def _put_over(files: dict[str, tarfile.TarInfo], layer: tarfile.TarFile) -> None:
    """Names with `.wh.` in front take away what a layer below has."""
    for file in layer:
        path = PurePosixPath(file.name.removeprefix("./").strip("/"))
        if path.name.startswith(".wh."):
            gone = path.with_name(path.name.removeprefix(".wh."))
            for known in [p for p in files if PurePosixPath(p).is_relative_to(gone)]:
                del files[known]
        else:
            files[str(path)] = file


def check(image: Image) -> None:
    """What holds for both images."""
    programs = {PurePosixPath(path).name for path in image.files if PurePosixPath(path).parent.name in ("bin", "sbin")}
    assert {"python3", "tini"} <= programs
    assert not programs & {"pip", "pip3", "uv", "gcc", "cc", "g++", "clang", "ld", "make"}, "no compilers or installers"
    assert image.named("pip", "ensurepip", "hatchling") == []
    assert image.named("pip.conf", ".netrc", "uv.toml", "uv.lock") == []
    assert "run/secrets" not in image.files or not [p for p in image.files if p.startswith("run/secrets/")]
    _check_modes(image)
    _check_bytecode(image)
    assert image.config["User"] == "1000:1000", "a number, or runAsNonRoot refuses it"
    assert image.config["Entrypoint"][:2] == ["/usr/bin/tini", "--"]
    assert "usr/bin/tini" in image.files


def _check_modes(image: Image) -> None:
    """Any user can read and start what is ours, and nobody can change it."""
    for path, file in image.below("opt").items():
        wanted = stat.S_IROTH | (stat.S_IXOTH if file.isdir() else 0)
        assert file.issym() or file.mode & wanted == wanted, f"{path}: {file.mode:o}"
        assert (file.uid, file.gid) == (0, 0), path
        assert file.issym() or not file.mode & (stat.S_IWOTH | stat.S_IWGRP), f"{path}: {file.mode:o}"


def _check_bytecode(image: Image) -> None:
    sources = [PurePosixPath(path) for path in image.below("opt/alignment") if path.endswith(".py")]
    compiled = [p.parent / "__pycache__" for p in sources]
    assert len(sources) > 50
    assert all(str(folder) in image.files for folder in compiled)
    for package in ("pydantic", "yaml"):
        assert [p for p in image.files if f"site-packages/{package}/__pycache__/__init__." in p], package


def labels(image: Image) -> dict[str, str]:
    prefix = "org.opencontainers.image."
    return {k.removeprefix(prefix): v for k, v in image.config["Labels"].items() if k.startswith(prefix)}

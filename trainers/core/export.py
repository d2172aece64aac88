"""What a phase leaves as a model: a Hugging Face directory, safetensors only."""

import shutil
from pathlib import Path

from trainers.core.models import LoadedModel
from trainers.files import commit_directory


def save_model(loaded: LoadedModel, directory: Path) -> None:
    """Write a Hugging Face model directory, all or nothing."""
    temporary = directory.with_name(f".{directory.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    if loaded.adapters is not None:
        loaded.model = loaded.adapters.merge_and_unload()
        loaded.adapters = None
    loaded.model.save_pretrained(temporary, safe_serialization=True)
    loaded.tokenizer.save_pretrained(temporary)
    commit_directory(temporary, directory)

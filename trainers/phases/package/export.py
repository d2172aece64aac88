"""Copies of the models, each a folder that transformers loads, with a card."""

import shutil
from pathlib import Path

from trainers.files import link_or_copy, new_directory
from trainers.phases.package.gather import Model

LINKED = (".safetensors", ".bin", ".model")
"""Large files that nobody edits: shared by hard links. Everything else is copied, so an edit here harms no artifact."""


def export_model(model: Model, target: Path, card: str) -> None:
    """Write the model's folder, all or nothing."""
    with new_directory(target) as folder:
        shutil.copytree(model.path, folder, copy_function=_shared_or_copied, dirs_exist_ok=True)
        (folder / "README.md").write_text(card)


def _shared_or_copied(source: str, target: str) -> None:
    if source.endswith(LINKED):
        link_or_copy(source, target)
    else:
        shutil.copy2(source, target)

"""What a phase leaves as a model: a Hugging Face directory, safetensors only."""

from pathlib import Path
from typing import Any

import torch

from trainers.contract import Diverged
from trainers.core.adapters import save_adapters
from trainers.core.context import PhaseContext
from trainers.core.layers import hold
from trainers.core.models import LoadedModel
from trainers.core.sharding import gathered
from trainers.files import new_directory

ADAPTER = "adapter"
"""Folder in the model's directory with the low-rank adapters alone, if there were any."""


def save_model(ctx: PhaseContext, loaded: LoadedModel) -> None:
    """Leave the phase's model, of which every process may hold a part. Raises Diverged if a weight is not finite."""
    ctx.meter.stage("saving")
    with gathered(loaded.model):
        if ctx.workers.is_main:
            write_model(loaded, ctx.dir.model)


def write_model(loaded: LoadedModel, directory: Path) -> None:
    """Write a Hugging Face model directory, all or nothing: adapters merged, and beside that alone.

    Raises Diverged if a weight is not finite: the last step's update is seen by no loss.
    """
    with new_directory(directory) as temporary:
        # A bf16 weight rounds a small update away: what adapters have learned in a short run would not be in the model.
        dtype = loaded.export_dtype or (loaded.model.dtype if loaded.adapters is None else torch.float32)
        if loaded.adapters is not None:
            save_adapters(loaded.adapters, temporary / ADAPTER)
            if dtype == torch.float32:
                loaded.model.float()  # before merging, not after
            loaded.model = loaded.adapters.merge_and_unload()
            loaded.adapters = None
        hold(loaded.model, dtype)
        for name, weight in loaded.model.named_parameters():
            if not weight.isfinite().all():
                raise Diverged(f"{name} is not finite after the last step; try a lower optim.lr")
        write_stop_tokens(loaded)
        loaded.model.save_pretrained(temporary, safe_serialization=True, state_dict=_state(loaded.model))
        loaded.tokenizer.save_pretrained(temporary)


def _state(model: Any) -> dict[str, torch.Tensor]:
    """A model's state dict as it is: a split model's own would be this process's part, whatever it has gathered."""
    not_saved = {name for name, _ in model.named_non_persistent_buffers()}
    buffers = {name: buffer for name, buffer in model.named_buffers() if name not in not_saved}
    return {name: p.detach() for name, p in model.named_parameters(remove_duplicate=False)} | buffers


def write_stop_tokens(loaded: LoadedModel) -> None:
    """Say in the model's generation settings at which tokens responses end, so that plain ``generate`` stops there too."""
    settings = getattr(loaded.model, "generation_config", None)
    if settings is None:  # a classifier
        return
    stop = sorted(loaded.chat.stop_ids)
    settings.eos_token_id = stop if len(stop) > 1 else stop[0]
    settings.pad_token_id = loaded.tokenizer.pad_token_id
    _make_savable(settings)


def _make_savable(settings: Any) -> None:
    """Published settings may name a temperature without sampling, which transformers reads and refuses to write."""
    try:
        settings.validate(strict=True)
    except ValueError:
        settings.do_sample = True

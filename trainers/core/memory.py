"""What a phase will need of a device's memory, said before it is needed. Bytes everywhere."""

from collections.abc import Iterable
from collections.abc import Sequence as List
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.distributed.tensor import DTensor

from trainers.core.adamw import MOMENTS
from trainers.core.batch import Sequence, collate
from trainers.core.context import PhaseContext
from trainers.core.layers import decoder_layers
from trainers.core.parallel import Workers
from trainers.core.quantization import is_packed, packed_bytes
from trainers.core.scoring import hidden_states
from trainers.core.sharding import is_split, local, release, whole_shape
from trainers.core.step import in_eval_mode
from trainers.core.trainee import Trainee
from trainers.sizing.at_once import CHUNK_ELEMENTS

PROBES = (32, 64, 128)
"""Tokens of the small forward passes that show what a large one keeps."""


@dataclass(frozen=True)
class Memory:
    weights: int
    gradients: int
    optimizer: int
    activations: int
    """Estimated: what the largest forward pass keeps for its backward pass, and a chunk of logits."""

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.activations


def print_memory(
    ctx: PhaseContext, trained: List[tuple[Trainee, Any]], frozen: Iterable[Any] = (), row: int | None = None
) -> None:
    """One line on rank 0. ``trained``: each trainee with its transformers model; ``frozen``: models beside them;
    ``row``: the tokens of the longest row, unless one holds a whole forward pass, as packed ones do.
    """
    # A row that is longer than passes are has one of its own.
    tokens = max(ctx.spec.parallel.micro_batch_tokens, row or 0)
    found = memory_needed(ctx.workers, trained, frozen, tokens, row or tokens)
    if ctx.workers.is_main:
        print(memory_line(found, tokens, device_bytes(ctx.workers.device)))


def memory_needed(
    workers: Workers, trained: List[tuple[Trainee, Any]], frozen: Iterable[Any], max_tokens: int, row: int
) -> Memory:
    """On one device. Trainees take turns, so of activations the largest count."""
    models = [model for _, model in trained] + list(frozen)
    for model in models:
        release(model)  # what a forward pass has left gathered is not what is held
    weights = {id(p): p for model in models for p in model.parameters()}
    parameters = [p for trainee, _ in trained for p in trainee.engine.parameters]
    moments = [_held(p) * trainee.moment_bytes for trainee, _ in trained for p in trainee.engine.parameters]
    # DDP gathers gradients in buckets beside them.
    copies = 1 if workers.world == 1 or any(is_split(model) for _, model in trained) else 2
    gradients, optimizer = copies * sum(map(_size, parameters)), len(MOMENTS) * sum(moments)
    if workers.zero is not None:
        gradients, optimizer = _zero_bytes(workers, parameters, optimizer)
    return Memory(
        sum(map(_size, weights.values())) + max(map(gathered_bytes, models)),
        gradients,
        optimizer,
        max(activation_bytes(workers, model, max_tokens, row) for _, model in trained),
    )


def _zero_bytes(workers: Workers, parameters: List[torch.Tensor], moments: int) -> tuple[int, int]:
    """Of gradients, and of moments with the fp32 weights that are updated, by ZeRO's stage and where they lie."""
    assert workers.zero is not None
    settings = workers.zero["zero_optimization"]
    numbers = sum(whole_shape(p).numel() for p in parameters)
    of_gradients = sum(whole_shape(p).numel() * p.element_size() for p in parameters)
    split = (moments + 4 * numbers) // workers.world
    on_device = workers.device.type == "cpu" or "offload_optimizer" not in settings
    return of_gradients // (workers.world if settings["stage"] > 1 else 1), split if on_device else 0


def activation_bytes(workers: Workers, model: Any, max_tokens: int, row: int) -> int:
    """Found by three small forward passes: a part is fixed (weights cast to bf16), most grows with the tokens, and what
    attention keeps where it is written out grows with the square of a row's.
    """
    kept = [kept_bytes(workers, model, n) for n in PROBES]
    square, linear, fixed = np.polyfit(PROBES, kept, 2)
    growing = max(square, 0.0) * max_tokens * row + linear * max_tokens
    if model.is_gradient_checkpointing:
        config = model.config.get_text_config()
        # Of every layer only its input is kept, and one layer at a time is computed again.
        growing = growing / config.num_hidden_layers + 4 * config.hidden_size * config.num_hidden_layers * max_tokens
    return int(max(fixed, 0.0) + growing) + _head_bytes(model, max_tokens)


def kept_bytes(workers: Workers, model: Any, num_tokens: int) -> int:
    """What a forward pass of the backbone keeps for its backward pass, without gradient checkpointing."""
    ids = np.arange(num_tokens, dtype=np.int64) % min(64, whole_shape(model.get_input_embeddings().weight)[0])
    batch = collate([Sequence(ids, np.ones(num_tokens, dtype=bool))], False, workers.device)
    kept: dict[int, int] = {}

    def look(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if not isinstance(tensor if tensor._base is None else tensor._base, nn.Parameter):
            kept[storage.data_ptr()] = storage.nbytes()
        # Itself it would hold the node that keeps it, which would hold it: all of that would stay for ever.
        return tensor.detach()

    # Eval mode: transformers checkpoints gradients in training mode alone.
    with in_eval_mode(model), saved_tensors_hooks(look, lambda tensor: tensor), workers.autocast():
        hidden = hidden_states(model, batch)  # holds what is kept, so no address is used twice
    del hidden
    return sum(kept.values())


def _head_bytes(model: Any, max_tokens: int) -> int:
    """A chunk of logits, its log-probabilities and its gradient; in fp32 the gradient of a trained head, which is there
    before the backward pass, and a copy of a head of another type.
    """
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if head is None:
        return 0
    shape = whole_shape(head.weight)
    chunk = min(CHUNK_ELEMENTS, max_tokens * shape[0])
    copies = int(head.weight.requires_grad) + int(head.weight.dtype != torch.float32)
    return 4 * (3 * chunk + copies * shape.numel())


def gathered_bytes(model: Any) -> int:
    """Of a split model's largest layer and the one that is fetched while it computes, in the type that they are held in."""
    if not is_split(model):
        return 0
    _, layers = decoder_layers(model, "splitting weights over processes")
    return 2 * max(sum(p.numel() * p.element_size() for p in layer.parameters()) for layer in layers)


def _held(weight: torch.Tensor) -> int:
    """Numbers of a weight that this process updates; under ZeRO all of them, whose stages are counted apart."""
    return local(weight).numel() if isinstance(weight, DTensor) else whole_shape(weight).numel()


def _size(tensor: torch.Tensor) -> int:
    if is_packed(tensor):
        return packed_bytes(tensor)
    tensor = getattr(tensor, "ds_tensor", tensor)  # this process's part, where ZeRO splits weights
    return local(tensor).numel() * tensor.element_size()


def device_bytes(device: torch.device) -> int | None:
    """Memory of a GPU; None for a CPU, whose memory is shared with others."""
    return torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None


def memory_line(memory: Memory, max_tokens: int, available: int | None) -> str:
    parts = {
        "weights": memory.weights,
        "gradients": memory.gradients,
        "optimizer": memory.optimizer,
        f"activations of {max_tokens} tokens (estimated)": memory.activations,
    }
    listed = ", ".join(f"{name} {_gib(size)}" for name, size in parts.items())
    of = "" if available is None else f" of {_gib(available)}"
    return f"memory on a device: {listed}; {_gib(memory.total)}{of} in all"


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB"

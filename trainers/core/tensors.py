"""Files of tensors that are whole, or known not to be: safetensors with a sum of every tensor's content.

A safetensors file tells when it was cut short, but not when blocks of it were lost or overwritten.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save, save_file

INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
SUMS = "sums"
"""Key of the file's metadata."""


class DamagedError(Exception):
    """A file that does not hold what was written to it. The message says in what way."""


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    save_file(*_with_sums(tensors, path))


def tensor_bytes(tensors: Mapping[str, torch.Tensor]) -> bytes:
    """The content of such a file; for small ones."""
    return save(*_with_sums(tensors))


def _with_sums(tensors: Mapping[str, torch.Tensor], *between: Any) -> tuple[Any, ...]:
    """Arguments of safetensors' functions, which copy nothing that is contiguous."""
    whole = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    sums = {name: content_sum(tensor) for name, tensor in whole.items()}
    return whole, *between, {SUMS: json.dumps(sums)}


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """All tensors of the file, on the CPU. Raises DamagedError."""
    try:
        with safe_open(path, "pt") as file:
            sums = dict(json.loads((file.metadata() or {})[SUMS]))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
    except FileNotFoundError as error:
        raise DamagedError(f"{path.name} is missing") from error
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        raise DamagedError(f"{path.name}: {error}") from error
    wrong = [name for name in sums.keys() | tensors.keys() if _sum_of(tensors, name) != sums.get(name)]
    if wrong:
        raise DamagedError(f"{path.name}: {min(wrong)} is not what was written")
    return tensors


def _sum_of(tensors: Mapping[str, torch.Tensor], name: str) -> int | None:
    return content_sum(tensors[name]) if name in tensors else None


def content_sum(tensor: torch.Tensor) -> int:
    """The sum of a tensor's bits, read as integers of its elements' size; overflow wraps around."""
    return int(tensor.contiguous().view(-1).view(INTEGERS[tensor.element_size()]).sum(dtype=torch.int64))

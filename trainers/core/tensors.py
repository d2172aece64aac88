"""Files of tensors that are whole, or known not to be: safetensors with a sum of every tensor's content.

A safetensors file tells when it was cut short, but not when blocks of it were lost or overwritten.
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
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


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> dict[str, int]:
    """Returns the sums."""
    whole, sums = _with_sums(tensors)
    save_file(whole, path, {SUMS: json.dumps(sums)})
    return sums


def tensor_bytes(tensors: Mapping[str, torch.Tensor]) -> bytes:
    """The content of such a file; for small ones."""
    whole, sums = _with_sums(tensors)
    return save(whole, {SUMS: json.dumps(sums)})


def _with_sums(tensors: Mapping[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], dict[str, int]]:
    """What safetensors' functions write without copying it, and the sums."""
    whole = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    return whole, {name: content_sum(tensor) for name, tensor in whole.items()}


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """All tensors of the file, on the CPU. Raises DamagedError."""
    with _opened(path) as file:
        sums = dict(json.loads((file.metadata() or {})[SUMS]))
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
    wrong = [name for name in sums.keys() | tensors.keys() if _sum_of(tensors, name) != sums.get(name)]
    if wrong:
        raise DamagedError(f"{path.name}: {min(wrong)} is not what was written")
    return tensors


Mark = tuple[str, tuple[int, ...], int]
"""Type, shape and sum of a tensor."""


def check_tensors(path: Path, marks: Mapping[str, Mark]) -> None:
    """Read the file, one tensor after the other. Raises DamagedError unless it holds what the marks say."""
    with _opened(path) as file:
        found = set(file.keys())
        wrong = [name for name in sorted(marks) if name not in found or _mark(file.get_tensor(name)) != marks[name]]
    if wrong:
        raise DamagedError(f"{path.name}: {wrong[0]} is not what was written")


def _mark(tensor: torch.Tensor) -> Mark:
    return str(tensor.dtype), tuple(tensor.shape), content_sum(tensor)


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, "pt") as file:
            yield file
    except FileNotFoundError as error:
        raise DamagedError(f"{path.name} is missing") from error
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        raise DamagedError(f"{path.name}: {error}") from error


def _sum_of(tensors: Mapping[str, torch.Tensor], name: str) -> int | None:
    return content_sum(tensors[name]) if name in tensors else None


def content_sum(tensor: torch.Tensor) -> int:
    """The sum of a tensor's bits, read as integers of its elements' size; overflow wraps around."""
    return int(tensor.contiguous().view(-1).view(INTEGERS[tensor.element_size()]).sum(dtype=torch.int64))

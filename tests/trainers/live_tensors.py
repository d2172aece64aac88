"""How much memory tensors take, exactly, whatever the allocator holds."""

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary


class Live(TorchDispatchMode):
    """Counts the bytes of tensors that are made inside: those there ``now``, and the ``most`` that were at once."""

    def __init__(self) -> None:
        super().__init__()
        self.storages, self.most = WeakIdKeyDictionary(), 0

    @property
    def now(self) -> int:
        return sum(self.storages.values())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = {id(storage) for storage in map(_storage, tree_leaves((args, kwargs)))}
        for storage in map(_storage, tree_leaves(out)):
            if storage is not None and id(storage) not in given:
                self.storages[storage] = storage.nbytes()
        self.most = max(self.most, self.now)
        return out


def _storage(tensor: Any) -> torch.UntypedStorage | None:
    return tensor.untyped_storage() if isinstance(tensor, torch.Tensor) else None

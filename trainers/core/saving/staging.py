"""Copies of the state of training in the machine's memory, which are written while training goes on."""

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner, create_default_local_save_plan
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.planner import SavePlan, WriteItem
from torch.distributed.tensor import DTensor


@dataclass
class Staged:
    """What this process writes of a state."""

    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    """This process's pieces, by the whole tensors' names."""
    items: list[WriteItem] = field(default_factory=list)
    """Where each piece lies in its tensor."""


class Staging:
    """Memory for one copy of this process's share. The next copy goes to the same place: fresh pages cost more than copying."""

    def __init__(self, rank: int, world: int) -> None:
        self.rank, self.world = rank, world
        self._memory: dict[str, torch.Tensor] = {}

    def stage(self, state: Iterable[tuple[str, torch.Tensor]]) -> Staged:
        """Copy what this process will write. All processes pass the same names in the same order.

        What several hold alike (a whole tensor, a shard that is repeated on other nodes) is written by one of them, the
        one that has least to write so far.
        """
        staged, loads = Staged(), dict[int, list[int]]()
        for name, tensor in state:
            copies, own = _copies(tensor, self.rank, self.world)
            load = loads.setdefault(copies, [0] * copies)
            chosen = load.index(min(load))
            load[chosen] += tensor.numel() * tensor.element_size()
            if chosen == own:
                self._add(staged, name, tensor)
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # from here on training may change what was copied
        return staged

    def _add(self, staged: Staged, name: str, tensor: torch.Tensor) -> None:
        local = (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach()
        if local.numel():  # short tensors leave the last processes nothing
            staged.tensors[name] = self._memory_for(name, local).copy_(local, non_blocking=True)
            staged.items += create_default_local_save_plan({name: tensor}, is_coordinator=False).items

    def _memory_for(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        found = self._memory.get(name)
        if found is None or found.shape != tensor.shape or found.dtype != tensor.dtype:
            found = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
            self._memory[name] = found
        return found


def _copies(tensor: torch.Tensor, rank: int, world: int) -> tuple[int, int]:
    """How many processes hold the same piece of a tensor, and the number of this process among them."""
    if not isinstance(tensor, DTensor):
        return world, rank
    mesh = tensor.device_mesh
    copies, own = 1, 0
    for dim, placement in enumerate(tensor.placements):
        if placement.is_replicate():
            copies, own = copies * mesh.size(dim), own * mesh.size(dim) + mesh.get_local_rank(dim)
    return copies, own


class StagedPlanner(DefaultSavePlanner):
    """Has torch.distributed.checkpoint write what was staged."""

    def __init__(self, staged: Staged) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self.staged = staged

    def create_local_plan(self) -> SavePlan:
        self.plan = SavePlan(self.staged.items)
        return self.plan

    def lookup_object(self, index: MetadataIndex) -> torch.Tensor:
        return self.staged.tensors[index.fqn]

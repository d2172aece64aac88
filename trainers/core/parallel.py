"""Processes, device, precision and model wrapping: the one place a parallel strategy touches.

Everything goes through accelerate. ``torchrun`` starts the processes; a plain ``python`` is a run of one.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TypeVar, cast

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs, gather_object
from torch import nn

from trainers.contract import BadInput
from trainers.spec import Parallel

T = TypeVar("T")


class Workers:
    """This process among its peers."""

    def __init__(self, parallel: Parallel) -> None:
        cuda = torch.cuda.is_available()
        self.bf16 = _use_bf16(parallel)
        # torch's CUDA build reports NCCL as available on machines without a GPU, so the backend is named here.
        # A single process gets none: accelerate would take a named backend for an initialised process group.
        group = [InitProcessGroupKwargs(backend="nccl" if cuda else "gloo")] if "RANK" in os.environ else []
        # The buffers of language models are tables that never change: nothing to send at every forward pass.
        ddp = DistributedDataParallelKwargs(broadcast_buffers=False)
        # No mixed precision of accelerate's: it patches a module's forward, and unwrapping the module takes that away.
        # What runs in bf16 is inside :meth:`autocast`.
        self.accelerator = Accelerator(cpu=not cuda, mixed_precision="no", kwargs_handlers=[*group, ddp])
        # Without a GPU, accelerate numbers the CPU by rank ("cpu:1"), which safetensors refuses to load to.
        self.device: torch.device = self.accelerator.device if cuda else torch.device("cpu")
        self.rank: int = self.accelerator.process_index
        self.local_rank: int = self.accelerator.local_process_index
        self.world: int = self.accelerator.num_processes
        if self.bf16 and cuda:
            # Heads alone multiply in fp32 then. TF32 rounds what they are given to 11 bits instead of bf16's 8 and
            # adds up in fp32; plain fp32 would be 15 times slower on tensor cores.
            torch.set_float32_matmul_precision("high")
        if parallel.strategy == "single" and self.world > 1:
            raise BadInput(f"parallel.strategy single cannot use {self.world} processes: set ddp, or procsPerNode: 1")

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def wrap(self, module: nn.Module) -> nn.Module:
        """Put a module that will be trained on the device and, with several processes, keep its gradients in step."""
        return self.accelerator.prepare_model(module)

    def plain(self, module: nn.Module) -> nn.Module:
        """The module itself, without what :meth:`wrap` put around it."""
        return self.accelerator.unwrap_model(module)

    def autocast(self) -> AbstractContextManager[None]:
        """Precision of a forward pass. Nothing else makes one run in bf16."""
        return torch.autocast(self.device.type, torch.bfloat16) if self.bf16 else nullcontext()

    @contextmanager
    def exchange(self, module: nn.Module, last: bool) -> Iterator[None]:
        """Around forward *and* backward of a wrapped module: gradients are exchanged in the last of a step's passes.

        DDP decides in the forward pass whether the backward pass that follows will exchange.
        """
        with nullcontext() if last else self.accelerator.no_sync(module):
            yield

    def backward(self, loss: torch.Tensor) -> None:
        """Add one pass's gradients. ``loss`` is this rank's part of a sum over all ranks and passes.

        DDP averages over ranks, so the sum is restored by multiplying with their number.
        """
        (loss * self.world).backward()

    def sum(self, value: torch.Tensor) -> torch.Tensor:
        """Sum over all processes."""
        return self.accelerator.reduce(value.to(self.device), "sum") if self.world > 1 else value

    def any(self, flag: bool) -> bool:
        """Whether the flag is set in any process; all processes get the same answer."""
        if self.world == 1:
            return flag
        return bool(self.sum(torch.tensor([float(flag)], device=self.device)).item() > 0)

    def gather_objects(self, items: list[object]) -> list[object]:
        """Concatenate the processes' lists, in rank order, everywhere."""
        return list(gather_object(items)) if self.world > 1 else items

    def from_main(self, make: Callable[[], T]) -> T:
        """What ``make`` returns on rank 0, everywhere; the others do not call it."""
        return cast(T, self.gather_objects([make()] if self.is_main else [])[0])

    def barrier(self) -> None:
        if self.world > 1:
            self.accelerator.wait_for_everyone()


def _use_bf16(parallel: Parallel) -> bool:
    if parallel.precision == "auto":
        return torch.cuda.is_available() and torch.cuda.is_bf16_supported()
    return parallel.precision == "bf16"

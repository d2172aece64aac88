"""Processes, device, precision and model wrapping: the one place a parallel strategy touches.

Everything goes through accelerate. ``torchrun`` starts the processes; a plain ``python`` is a run of one.
"""

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs
from torch import nn

from trainers.contract import BadInput
from trainers.spec import Parallel


class Workers:
    """This process among its peers."""

    def __init__(self, parallel: Parallel) -> None:
        cuda = torch.cuda.is_available()
        self.bf16 = _use_bf16(parallel)
        # torch's CUDA build reports NCCL as available on machines without a GPU, so the backend is named here.
        # A single process gets none: accelerate would take a named backend for an initialised process group.
        group = [InitProcessGroupKwargs(backend="nccl" if cuda else "gloo")] if "RANK" in os.environ else []
        precision = "bf16" if self.bf16 else "no"
        self.accelerator = Accelerator(cpu=not cuda, mixed_precision=precision, kwargs_handlers=group)
        # Without a GPU, accelerate numbers the CPU by rank ("cpu:1"), which safetensors refuses to load to.
        self.device: torch.device = self.accelerator.device if cuda else torch.device("cpu")
        self.rank: int = self.accelerator.process_index
        self.local_rank: int = self.accelerator.local_process_index
        self.world: int = self.accelerator.num_processes
        if self.bf16:
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

    def unwrap(self, module: nn.Module) -> nn.Module:
        return self.accelerator.unwrap_model(module, keep_fp32_wrapper=False)

    def autocast(self) -> AbstractContextManager[None]:
        """Precision of a forward pass through a module that was not wrapped."""
        return torch.autocast(self.device.type, torch.bfloat16) if self.bf16 else nullcontext()

    @contextmanager
    def accumulate(self, module: nn.Module, last: bool) -> Iterator[None]:
        """Exchange gradients only in the last micro-batch of a step."""
        with nullcontext() if last else self.accelerator.no_sync(module):
            yield

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
        if self.world == 1:
            return items
        from accelerate.utils import gather_object

        return list(gather_object(items))

    def barrier(self) -> None:
        if self.world > 1:
            self.accelerator.wait_for_everyone()


def _use_bf16(parallel: Parallel) -> bool:
    if parallel.precision == "auto":
        return torch.cuda.is_available() and torch.cuda.is_bf16_supported()
    return parallel.precision == "bf16"

"""This process among its peers: device, precision, how models are split, and what processes tell each other.

Everything goes through accelerate. ``torchrun`` starts the processes; a plain ``python`` is a run of one.
"""

import logging
import os
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs, gather_object
from torch import nn

from trainers.contract import BadInput, Interrupted
from trainers.core.presence import PATIENCE, Presence, end_process, find_store
from trainers.core.sharding import sharding_for
from trainers.spec import DeepSpeed, Parallel
from trainers.zero_config import zero_config

T = TypeVar("T")


class Workers:
    """This process among its peers."""

    def __init__(self, parallel: Parallel, base_dir: Path = Path()) -> None:
        """``base_dir`` is where relative paths in the settings start. Raises BadInput for settings that cannot be honoured."""
        cuda = torch.cuda.is_available()
        self.bf16 = _use_bf16(parallel)
        self.attention = parallel.attention
        if parallel.strategy in ("fsdp", "deepspeed") or parallel.splits_frozen:
            _be_a_group()
        self.zero = _zero(parallel, base_dir)
        """DeepSpeed's configuration, if that is the strategy."""
        find_store(os.environ)
        # torch's CUDA build reports NCCL as available on machines without a GPU, so the backend is named here.
        # A single process gets none: accelerate would take a named backend for an initialised process group.
        backend = InitProcessGroupKwargs(backend="nccl" if cuda else "gloo", timeout=PATIENCE)
        group = [backend] if "RANK" in os.environ else []
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
        self.presence = Presence(self.rank, self.world, end_process) if self.world > 1 else None
        if self.bf16 and cuda:
            # Heads alone multiply in fp32 then. TF32 rounds what they are given to 11 bits instead of bf16's 8 and
            # adds up in fp32; plain fp32 would be 15 times slower on tensor cores.
            torch.set_float32_matmul_precision("high")
        if self.zero is not None:
            _start_deepspeed(cuda)
        if parallel.strategy == "single" and self.world > 1:
            raise BadInput(f"parallel.strategy single cannot use {self.world} processes: set ddp, or procsPerNode: 1")
        self.trained_sharding = sharding_for(parallel, False, self.bf16, self.device, self.world)
        """How models that are trained are split; None: they are not."""
        self.frozen_sharding = sharding_for(parallel, True, self.bf16, self.device, self.world)
        """The same of models that are not trained."""

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def wrap(self, module: nn.Module) -> nn.Module:
        """Put a module of whole weights on the device and, with several processes, keep its gradients in step by DDP."""
        return self.accelerator.prepare_model(module)

    def autocast(self) -> AbstractContextManager[None]:
        """Precision of a forward pass. Nothing else makes one run in bf16."""
        return torch.autocast(self.device.type, torch.bfloat16) if self.bf16 else nullcontext()

    def sum(self, value: torch.Tensor) -> torch.Tensor:
        """Sum over all processes."""
        return self.accelerator.reduce(value.to(self.device), "sum") if self.world > 1 else value

    def any(self, flag: bool) -> bool:
        """Whether the flag is set in any process; all processes get the same answer."""
        if self.world == 1:
            return flag
        return bool(self.sum(torch.tensor([float(flag)], device=self.device)).item() > 0)

    def gather_objects(self, items: list[T]) -> list[T]:
        """Concatenate the processes' lists, in rank order, everywhere."""
        return list(gather_object(items)) if self.world > 1 else items

    def from_main(self, make: Callable[[], T]) -> T:
        """What ``make`` returns on rank 0, everywhere; the others do not call it."""
        return self.gather_objects([make()] if self.is_main else [])[0]

    def barrier(self) -> None:
        if self.world > 1:
            self.accelerator.wait_for_everyone()

    @contextmanager
    def heard_of(self) -> Iterator[None]:
        """Peers are told how this ends: that they need this process no more, or cannot go on without it."""
        if self.presence is None:
            yield
            return
        try:
            yield
        except Interrupted:  # all stop together; one may be longer about it
            self.presence.close()
            raise
        except BaseException:
            self.presence.fail()
            raise
        self.presence.close()


def _be_a_group() -> None:
    """Let a process that nobody started with others be a group of one, which FSDP asks for."""
    if "RANK" in os.environ:
        return
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    alone = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "LOCAL_WORLD_SIZE": 1}
    os.environ |= {name: str(value) for name, value in alone.items()}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}


def _zero(parallel: Parallel, base_dir: Path) -> dict[str, Any] | None:
    """DeepSpeed's configuration. Where it is not used it is kept from being imported, as packages do that find it."""
    if parallel.strategy == "deepspeed":
        return zero_config(parallel.deepspeed or DeepSpeed(), base_dir)
    sys.modules.setdefault("deepspeed", None)  # type: ignore[arg-type]
    return None


def _start_deepspeed(cuda: bool) -> None:
    """Let DeepSpeed use the process group that there is. Raises BadInput if it is not installed.

    On CPUs it would compile a collective of its own at every first start, which needs a compiler; gloo's does.
    """
    if not cuda:
        os.environ["DS_ACCELERATOR"] = "cpu"
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    try:
        import deepspeed
    except ImportError as error:
        raise BadInput(
            "parallel.strategy deepspeed needs DeepSpeed: install this package's extra `deepspeed`"
        ) from error
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend="nccl" if cuda else "gloo", verbose=False)


def _use_bf16(parallel: Parallel) -> bool:
    if parallel.precision == "auto":
        return torch.cuda.is_available() and torch.cuda.is_bf16_supported()
    return parallel.precision == "bf16"

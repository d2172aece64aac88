"""Decoder layers as torch.compile makes them."""

import os
import shutil
import sys
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from trainers.contract import BadInput
from trainers.core.layers import decoder_layers


def compile_layers(model: Any, device: torch.device) -> None:
    """Compile every decoder layer in its place. Layers that are alike share few programs, for sequences of any length.

    Each layer's own forward is compiled: what hangs on its being called (gathering of weights, recomputation in the
    backward pass) stays around it. Raises BadInput where there is no compiler, or no plain list of layers.
    """
    _check_compiler(device)
    for layer in decoder_layers(model, "parallel.compile")[1]:
        layer.forward = torch.compile(layer.forward, dynamic=True)


def uncompiled() -> AbstractContextManager[None]:
    """Within it layers run as they are. Token by token the cache is another object at every step, and so is a program."""
    if "torch._dynamo" not in sys.modules:  # nothing was compiled, and it takes seconds to import
        return nullcontext()
    return torch.compiler.set_stance("force_eager")


def _check_compiler(device: torch.device) -> None:
    """torch's own error comes in the middle of a forward pass. For CPUs it needs $CXX or g++, for GPUs Triton needs a C one."""
    wanted = ["CXX", "g++"] if device.type == "cpu" else ["CC", "gcc", "clang"]
    candidates = [os.environ[wanted[0]]] if wanted[0] in os.environ else wanted[1:]
    if not any(map(shutil.which, candidates)):
        raise BadInput(
            f"parallel.compile needs a compiler, and there is no {' or '.join(candidates)} here: "
            f"install one, name it in ${wanted[0]}, or set compile: false"
        )

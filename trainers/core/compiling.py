"""Decoder layers as torch.compile makes them."""

import os
import shutil
import sys
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from trainers.contract import BadInput
from trainers.core.layers import decoder_layers

PROGRAMS = 32
"""Of one kind of layer. torch gives up at 8, and computes without any from then on: with and without gradients, with and
without a mask, one row or several, trained and frozen are 16 already.
"""


def compile_layers(model: Any, device: torch.device) -> None:
    """Compile every decoder layer in its place. Layers that are alike share few programs, for sequences of any length.

    Each layer's own forward is compiled: what hangs on its being called, such as gathering of weights, stays around it.
    Raises BadInput where there is no compiler, or no plain list of layers.
    """
    _check_compiler(device.type)
    torch._dynamo.config.recompile_limit = PROGRAMS
    for layer in decoder_layers(model, "parallel.compile")[1]:
        layer.forward = torch.compile(layer.forward, dynamic=True)


def uncompiled() -> AbstractContextManager[None]:
    """Within it layers run as they are, which passes with a cache of keys and values need.

    Its entries are guarded by layer and by what they hold: every layer would get programs of its own, token by token.
    """
    if "torch._dynamo" not in sys.modules:  # nothing was compiled, and it takes seconds to import
        return nullcontext()
    return torch.compiler.set_stance("force_eager")


def missing_compiler(device: str) -> str | None:
    """What makes programs for a type of device and is not there, or None: for GPUs Triton needs a C compiler."""
    wanted = ["CXX", "g++"] if device == "cpu" else ["CC", "gcc", "clang"]
    candidates = [os.environ[wanted[0]]] if wanted[0] in os.environ else wanted[1:]
    return None if any(map(shutil.which, candidates)) else " or ".join(candidates)


def _check_compiler(device: str) -> None:
    """torch's own error comes in the middle of a forward pass."""
    if (missing := missing_compiler(device)) is not None:
        variable = "CXX" if device == "cpu" else "CC"
        raise BadInput(
            f"parallel.compile needs a compiler, and there is no {missing} here: "
            f"install one, name it in ${variable}, or set compile: false"
        )

"""What a processor or a GPU does at best of the matrix products that work cannot do without: how far from its roof a figure is.

Two libraries multiply fp32 on a processor, both in torch: MKL, which torch uses by itself, and oneDNN, which this project does
where MKL is slow (docs/adr/0027).
"""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

TRIES = 20
Multiply = Callable[[torch.Tensor, torch.Tensor], Any]
"""Takes rows (N, I) and a weight (O, I)."""


def by_onednn(rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    found: torch.Tensor = torch.ops.mkldnn._linear_pointwise(rows, weight, None, "none", [], "")
    return found


def ways(device: str) -> dict[str, Multiply]:
    """What can multiply on a device, by name; torch's own way first."""
    linear: Multiply = torch.nn.functional.linear
    if device != "cpu":
        return {"cuBLAS": linear}
    there = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    return {"MKL": linear} | ({"oneDNN": by_onednn} if there else {})


@torch.no_grad()
def seconds(weights: list[torch.Tensor], rows: int, multiply: Multiply, backward: bool = False) -> float:
    """Of the processor, or by the clock of a GPU, for so many rows through all weights, at their best.

    ``backward``: with the two products more that a training step takes, for the gradients of rows and of weights.
    """
    weights = [weight.detach() for weight in weights]
    device = weights[0].device
    into, out = (
        {width: torch.randn(rows, width, dtype=weights[0].dtype, device=device) for width in {w.shape[i] for w in weights}}
        for i in (1, 0)
    )  # fmt: skip
    times = []
    for _ in range(TRIES):
        began = now(device)
        for weight in weights:
            multiply(into[weight.shape[1]], weight)
            if backward:
                slope = out[weight.shape[0]]
                multiply(slope, weight.T)
                multiply(slope.T, into[weight.shape[1]].T)
        times.append(now(device) - began)
    return min(times)


def now(device: torch.device) -> float:
    """Seconds of the processor; of the clock where a GPU computes."""
    if device.type == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


# ---------------------------------------------------------------- of training, for make bench


def ready(_: dict[str, Any]) -> None:
    from transformers import LlamaForCausalLM  # noqa: F401


def run(job: dict[str, Any]) -> dict[str, Any]:
    """Tokens per second, by what multiplies, of training on so many tokens, of which some are scored by the head."""
    from transformers import LlamaForCausalLM

    dtype = torch.float32 if job["device"] == "cpu" else torch.bfloat16
    of: Any = LlamaForCausalLM.from_pretrained(Path(job["folder"]) / "model", dtype=dtype).to(job["device"])
    layers = [layer.weight for layer in of.model.modules() if isinstance(layer, torch.nn.Linear)]
    return {
        "roofs": {
            name: job["rows"]
            / (seconds(layers, job["rows"], way, True) + seconds([of.lm_head.weight], job["scored"], way, True))
            for name, way in ways(job["device"]).items()
        }
    }

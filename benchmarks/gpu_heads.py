"""Losses on a language head on a device: ours beside autograd's, torch's and Liger's fused cross-entropy.

    python benchmarks/gpu_heads.py

A part of ``make gpu-check``. Every form gets the same final hidden states and head, and leaves their gradients; time, the
peak of memory above the inputs, and how far loss and gradients are from those in fp32 are printed as a table. Where the
package liger-kernel is not installed, or there is no GPU for it, the table says so. Without a GPU sizes are tiny.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace

import torch
from torch import nn
from torch.nn.functional import cross_entropy, linear, linear_cross_entropy

from trainers.core.head_losses import head_loss
from trainers.core.scoring import target_logprobs

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
COUNT, WIDTH, VOCABULARY = (8192, 4096, 131072) if ON_GPU else (96, 32, 512)
REPEATS = 5


@dataclass(frozen=True)
class Given:
    """Hidden states (K, H), a head of V x H, and the targets (K,)."""

    hidden: torch.Tensor
    head: nn.Linear
    targets: torch.Tensor

    def gradients(self) -> list[torch.Tensor]:
        return [tensor.grad for tensor in (self.hidden, self.head.weight) if tensor.grad is not None]

    def clear(self) -> None:
        self.hidden.grad = self.head.weight.grad = None


def given(dtype: torch.dtype) -> Given:
    torch.manual_seed(0)
    head = nn.Linear(WIDTH, VOCABULARY, bias=False, device=DEVICE)
    hidden = torch.randn(COUNT, WIDTH, device=DEVICE)
    targets = torch.randint(VOCABULARY, (COUNT,), device=DEVICE)
    return Given(hidden.to(dtype).requires_grad_(), head.to(dtype), targets)


def autograd(one: Given) -> torch.Tensor:
    return cross_entropy(linear(one.hidden, one.head.weight), one.targets, reduction="sum")


def ours(one: Given) -> torch.Tensor:
    config = SimpleNamespace(get_text_config=SimpleNamespace)
    model = SimpleNamespace(get_output_embeddings=lambda: one.head, config=config)
    logprobs = target_logprobs(SimpleNamespace(target_ids=one.targets))
    return head_loss(model, one.hidden, logprobs, lambda values, _: -values.sum())[0]


def torchs(one: Given) -> torch.Tensor:
    options = nn.LinearCrossEntropyOptions(batch_chunk_size=512, chunking_method=None)
    return linear_cross_entropy(one.hidden, one.head.weight, one.targets, reduction="sum", options=options)


def ligers(one: Given) -> torch.Tensor:
    """Its weight's gradient is summed up in fp32, as ours is."""
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    loss = LigerFusedLinearCrossEntropyLoss(reduction="sum", accum_dtype=torch.float32)
    found: torch.Tensor = loss(one.head.weight, one.hidden, one.targets)
    return found


Form = tuple[Callable[[Given], torch.Tensor], torch.dtype]
FORMS: dict[str, Form] = {
    "ours": (ours, torch.float32),
    "autograd": (autograd, torch.float32),
    "torch's, in chunks": (torchs, torch.float32),
    "Liger's": (ligers, torch.float32),
    "Liger's, all in bf16": (ligers, torch.bfloat16),
}


@dataclass(frozen=True)
class Found:
    seconds: float
    peak: float
    """Bytes above the inputs."""
    off: float
    """The largest distance of a gradient's norm of differences from that of the exact one, and of the loss."""


def exact() -> list[torch.Tensor]:
    """Loss and gradients in fp32, without TF32."""
    torch.set_float32_matmul_precision("highest")
    one = given(torch.float32)
    loss = autograd(one)
    loss.backward()
    return [loss.detach(), *one.gradients()]


def measured(form: Form, wanted: list[torch.Tensor]) -> Found:
    torch.set_float32_matmul_precision("high")  # what phases in bf16 compute heads with
    function, dtype = form
    one = given(dtype)
    function(one).backward()  # compiles kernels
    seconds = []
    for _ in range(REPEATS):
        one.clear()
        before = _memory(reset=True)
        begin = time.perf_counter()
        loss = function(one)
        loss.backward()
        after = _memory()  # waits for the device
        seconds.append(time.perf_counter() - begin)
    pairs = zip([loss.detach(), *one.gradients()], wanted, strict=True)
    off = max(float((a.float() - b).norm() / b.norm()) for a, b in pairs)
    return Found(min(seconds), after - before, off)


def _memory(reset: bool = False) -> float:
    """Bytes in use, or their peak since the last reset; none are known of a CPU."""
    if not ON_GPU:
        return float("nan")
    torch.cuda.synchronize()
    if not reset:
        return torch.cuda.max_memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated()


def table() -> list[str]:
    wanted = exact()
    lines = [
        f"{COUNT:,} positions x {WIDTH:,} x {VOCABULARY:,} tokens", "",
        "| form | ms | peak GiB | off by | |", "| --- | --- | --- | --- | --- |",
    ]  # fmt: skip
    seconds = {}
    for name, form in FORMS.items():
        try:
            found = measured(form, wanted)
        except Exception as error:  # noqa: BLE001 - of an optional package, or memory: what it says is the finding
            lines.append(f"| {name} | | | | {type(error).__name__}: {str(error).splitlines()[0][:120]} |")
            continue
        seconds[name] = found.seconds
        lines.append(f"| {name} | {found.seconds * 1e3:.1f} | {found.peak / 2**30:.2f} | {found.off:.1e} | |")
    return [*lines, "", f"The fastest: {min(seconds, key=lambda name: seconds[name])}."]


if __name__ == "__main__":
    print("\n".join(table()))

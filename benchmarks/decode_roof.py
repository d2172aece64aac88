"""What share of an H100's memory bandwidth a step of sampling could use: on paper, since none has been lent.

    python benchmarks/decode_roof.py [--context 512]

For Llamas of three sizes in bf16 and 1 and 64 rows of so many tokens. The roof is what a step cannot do without reading: weights
once, and the keys and values of all rows, at the data sheet's bandwidth. A step takes beside these what the engine does with
logits, and a time for each launch. Launches are counted: a step of the engine's own code runs here, on a model of the same number
of layers and no width, and every operation that is no view of another tensor counts as one.

What a launch costs is solved from a published measurement on an H100, of another engine that launches one by one, too (the
constants below). So the table says what to expect, not what is. The last column is what a launch could take on the device for a
step of 0.6 of the roof. Tested by arithmetic in tests/trainers/test_decode_roof.py.
"""

import argparse
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM

BANDWIDTH = 3.35e12
"""Bytes a second of an H100 SXM5 (NVIDIA's data sheet)."""
REACHED = 0.9
"""Of the bandwidth, by kernels that read large weights: an assumption."""
MEASURED_SHARE, MEASURED_GAIN = 0.27, 1.259
"""Of the roof that transformers reached on an H100 with one row of 2,048 tokens of Qwen2.5 7B in bf16, and how many times as fast
it was with CUDA graphs (arXiv:2605.30571, May 2026; it does not say how many launches a step has, so they are counted here)."""
AIM = 0.6
"""Of the roof."""
COLUMNS = (
    "model", "rows", "weights, MB", "keys and values, MB", "launches", "roof, ms", "a step, ms (of the roof)",
    "with CUDA graphs", "µs a launch for 0.6",
)  # fmt: skip
LOGITS = 36
"""Bytes of memory's traffic for each logit: written in bf16 (2), read (2) and written as fp32 (4), read for the largest (4), less
the largest (8), as weights (8), and read for two sums (8)."""
VIEWS = frozenset({"t", "view", "_unsafe_view", "slice", "unsqueeze", "squeeze", "expand", "transpose", "permute", "split",
    "split_with_sizes", "select", "unbind", "detach", "alias", "as_strided", "reshape", "_reshape_alias", "empty",
    "_local_scalar_dense"})  # fmt: skip
"""Operations that launch nothing. The one look at the device in a step copies eight bytes, which is left out."""


@dataclass(frozen=True)
class Shape:
    """A Llama."""

    name: str
    hidden: int
    inner: int
    layers: int
    heads: int
    keys: int
    vocabulary: int

    def weights(self) -> int:
        """Bytes that a step reads: of layers and the head, and of no embeddings but its tokens' own."""
        head_width = self.hidden // self.heads
        attention = 2 * self.hidden * self.hidden + 2 * self.hidden * self.keys * head_width
        layer = attention + 3 * self.hidden * self.inner + 2 * self.hidden
        return 2 * (self.layers * layer + self.hidden * self.vocabulary + self.hidden)

    def cache(self, tokens: int) -> int:
        """Bytes of keys and values of so many tokens."""
        return 2 * 2 * tokens * self.layers * self.keys * (self.hidden // self.heads)


SHAPES = (
    Shape("0.5B", 896, 4864, 24, 14, 2, 151936),
    Shape("1.5B", 1536, 8960, 28, 12, 2, 151936),
    Shape("8B", 4096, 14336, 32, 32, 8, 128256),
)
"""Of Qwen2.5 0.5B and 1.5B, as ``make bench-gpu`` has them, and of Llama 3.1 8B."""
THEIRS = Shape("7B", 3584, 18944, 28, 28, 4, 152064)
"""What was measured: Qwen2.5 7B."""


class Launches(TorchDispatchMode):
    """Counts operations that are no views."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if (name := func.overloadpacket.__name__) not in VIEWS:
            self.seen[name] += 1
        return func(*args, **(kwargs or {}))


def without_width(layers: int) -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512, hidden_size=64, intermediate_size=128, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, bos_token_id=None, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    return LlamaForCausalLM(config).to(torch.bfloat16).eval()


@torch.no_grad()
def ours(layers: int) -> int:
    """Launches of a step of the engine, in the middle of responses."""
    from trainers.core.generate import _Run
    from trainers.spec import Sampling

    uniforms = torch.full((4, 8), 0.5, dtype=torch.float64)
    run = _Run(
        without_width(layers), [[1, 2, 3]] * 4, Sampling(max_new_tokens=8), frozenset({600}), uniforms, 0, None, False
    )
    run._replace()
    run._advance()
    with Launches() as counted:
        run._advance()
        run.going.sum()
    # A GPU has torch's norm as one kernel; on a processor it is several operations.
    return counted.seen.total() - (2 * layers + 1) * (of_a_norm() - 1)


def of_a_norm() -> int:
    with Launches() as counted:
        torch.nn.functional.rms_norm(torch.ones(2, 4, dtype=torch.bfloat16), (4,), None, 1e-6)
    return counted.seen.total()


@torch.no_grad()
def theirs(layers: int) -> int:
    """Launches of transformers' own modules for a token of one row, and of the choice of the likeliest one."""
    model, ids = without_width(layers), torch.tensor([[1, 2, 3]])
    cache = model(ids, use_cache=True).past_key_values
    with Launches() as counted:
        model(ids[:, :1], past_key_values=cache, use_cache=True).logits[:, -1].argmax(-1)
    return counted.seen.total()


def roof(shape: Shape, rows: int, context: int) -> float:
    """Seconds of a step that only reads what it must."""
    return (shape.weights() + shape.cache(rows * context)) / BANDWIDTH


def costs(launches: int) -> tuple[float, float]:
    """Seconds of a launch by the processor, and of one on the device beyond what it reads, of the published measurement.

    Without graphs a step lasts as long as the processor launches; with them, as the device takes.
    """
    floor = roof(THEIRS, 1, 2048)
    eager = floor / MEASURED_SHARE
    return eager / launches, (eager / MEASURED_GAIN - floor / REACHED) / launches


@dataclass(frozen=True)
class Step:
    """Seconds of the roof, and of a step as it is and with CUDA graphs."""

    roof: float
    eager: float
    graphs: float


def step(shape: Shape, rows: int, context: int, launches: int, cost: tuple[float, float]) -> Step:
    read = shape.weights() + shape.cache(rows * context) + LOGITS * rows * shape.vocabulary
    device = read / (BANDWIDTH * REACHED) + launches * cost[1]
    return Step(roof(shape, rows, context), max(launches * cost[0], device), device)


def allowed(shape: Shape, rows: int, context: int, launches: int) -> float:
    """Seconds that each launch may take on the device beyond what it reads, for a step at the aimed-at share of the roof."""
    return (roof(shape, rows, context) / AIM - step(shape, rows, context, 0, (0.0, 0.0)).graphs) / launches


def line(shape: Shape, rows: int, context: int, launches: int, cost: tuple[float, float]) -> str:
    found = step(shape, rows, context, launches, cost)
    shares = " | ".join(f"{each * 1e3:.2f} ({found.roof / each:.2f})" for each in (found.eager, found.graphs))
    megabytes = f"{shape.weights() / 1e6:,.0f} | {shape.cache(rows * context) / 1e6:,.0f}"
    return (
        f"| {shape.name} | {rows} | {megabytes} | {launches:,} | {found.roof * 1e3:.2f} | {shares} | "
        f"{allowed(shape, rows, context, launches) * 1e6:.1f} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--context", type=int, default=512, help="tokens of each row")
    context = parser.parse_args().context
    cost = costs(theirs(THEIRS.layers))
    print(
        f"a launch: {cost[0] * 1e6:.1f} us by the processor, {cost[1] * 1e6:.1f} us on the device beyond what it reads\n"
    )
    print(f"| {' | '.join(COLUMNS)} |\n" + "| --- " * len(COLUMNS) + "|")
    for shape in SHAPES:
        launches = ours(shape.layers)
        for rows in (1, 64):
            print(line(shape, rows, context, launches, cost))


if __name__ == "__main__":
    main()

"""Sampling with steps as CUDA graphs on a GPU, beside steps that launch one operation after the other.

    python benchmarks/gpu_graphs.py

A part of ``make gpu-check``. Random Llamas of real shape in bf16 answer 1 and 64 prompts of 256 tokens with 256 each. Graphs look
at keys up to a few widths, which rounds otherwise than steps that look as far as need be; so tokens are held against those of
steps of the same widths that are launched one by one, and have to be the same. Told are tokens per second, how far
log-probabilities are apart at most, what recording took, and the memory that graphs hold. Without a GPU a model is tiny, in
fp32, and there are no graphs.
"""

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from decode_roof import SHAPES, Shape
from transformers import LlamaConfig, LlamaForCausalLM

from trainers.core import graphs
from trainers.core.generate import Response, generate
from trainers.spec import Sampling

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda", 0) if ON_GPU else torch.device("cpu")
TINY = Shape("tiny", 64, 128, 2, 4, 2, 512)
MODELS, TOKENS = (SHAPES, 256) if ON_GPU else ((TINY,), 24)
COLUMNS = (
    "model",
    "rows",
    "tokens/s one by one",
    "with graphs",
    "the same tokens",
    "nats apart",
    "graphs",
    "s to record",
    "MiB that they hold",
)


@dataclass
class Told:
    """Records, and tells what it took."""

    record: graphs.Record
    count: int = 0
    seconds: float = 0.0
    taken: int = 0
    """Bytes of the device: of graphs, of what their steps compute, and of a stream of their own."""

    def __call__(self, step: graphs.Replay) -> graphs.Replay:
        began, free = _now(), _free()
        replay = self.record(step)
        self.seconds += _now() - began
        self.taken += free - _free()
        self.count += 1
        return replay


def one_by_one(step: graphs.Replay) -> graphs.Replay:
    """No graph, but its widths."""
    step()
    return step


def model_of(shape: Shape) -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=shape.vocabulary, hidden_size=shape.hidden, intermediate_size=shape.inner,
        num_hidden_layers=shape.layers, num_attention_heads=shape.heads, num_key_value_heads=shape.keys,
        max_position_embeddings=4 * TOKENS, bos_token_id=None, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16 if ON_GPU else torch.float32)
    try:
        with torch.device(DEVICE):
            return LlamaForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(before)


def sampled(model: Any, rows: int, record: graphs.Record | None) -> tuple[list[Response], float]:
    """Responses, and seconds."""
    draw = torch.Generator().manual_seed(0)
    prompts = torch.randint(1, model.config.vocab_size, (rows, TOKENS), generator=draw).tolist()
    sampling = Sampling(max_new_tokens=TOKENS, batch_size=rows)
    began = _now()
    found = generate(model, prompts, sampling, frozenset(), draw, record=record)
    return found, _now() - began


def line(model: Any, name: str, rows: int, recorder: Callable[[], graphs.Record | None]) -> tuple[str, bool]:
    """A row of the table, and whether all is as it should be."""
    sampled(model, rows, one_by_one)  # first calls allocate and look things up
    _, plain = sampled(model, rows, None)
    wanted, _ = sampled(model, rows, one_by_one)
    speed, record = f"| {name} | {rows} | {rows * TOKENS / plain:,.0f}", recorder()
    if record is None:
        return f"{speed} | {graphs.given_up[-1] if graphs.given_up else 'no GPU'} | | | | | |", not ON_GPU
    told = Told(record)
    found, seconds = sampled(model, rows, told)
    same = [one.ids for one in found] == [other.ids for other in wanted] and not graphs.given_up
    ours, theirs = ([value for response in some for value in response.logprobs] for some in (found, wanted))
    apart = max(abs(a - b) for a, b in zip(ours, theirs, strict=True))
    costs = f"{told.count} | {told.seconds:.2f} | {told.taken / 2**20:,.0f} |"
    return f"{speed} | {rows * TOKENS / seconds:,.0f} | {'yes' if same else 'NO'} | {apart:.1e} | {costs}", same


def _now() -> float:
    if ON_GPU:
        torch.cuda.synchronize()
    return time.perf_counter()


def _free() -> int:
    return torch.cuda.mem_get_info()[0] if ON_GPU else 0


def main() -> int:
    print(f"| {' | '.join(COLUMNS)} |\n" + "| --- " * len(COLUMNS) + "|")
    well = True
    for shape in MODELS:
        model = model_of(shape)
        for rows in (1, 64):
            text, good = line(model, shape.name, rows, lambda: graphs.recorder(DEVICE))
            print(text, flush=True)
            well = well and good
        del model
    return int(not well)


if __name__ == "__main__":
    sys.exit(main())

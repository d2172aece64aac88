"""Sampling of responses: ours beside transformers' ``generate``, and beside the matrix products that it takes at least.

    python benchmarks/sampling.py [--batches 1,16,64] [--threads 1] [--rounds 3] [--lengths uniform,varied] [--split]

A small random model (7.4M parameters, vocabulary 8,192, fp32), prompts of 8 to 40 tokens. ``uniform``: every response has
--tokens tokens. ``varied``: a set of tokens ends a response, the same for both, so that lengths are geometric, about 41.
Both sample at temperature 1. Ours and theirs take turns; a figure is tokens per second of the processor (of the clock in
brackets), the median of the rounds. The roof is the products of linear layers alone: of the prompts' tokens, and of as many
full steps as the tokens make. --split says where ours spends its time.

The roof is that of MKL, by which torch multiplies; ours multiplies by oneDNN, so it may come above it. Figures, and what did and
did not help, are in docs/benchmarks.md.
"""

import argparse
import time
from collections.abc import Callable
from functools import partial
from statistics import median

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from trainers.core.generate import generate
from trainers.spec import Sampling

VOCABULARY = 8192
ENDS = 200
"""Tokens that end a response of varied length, one in 41."""


def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=256, intermediate_size=688, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=1024, tie_word_embeddings=False,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def prompts(count: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(8, 41, (count,), generator=generator).tolist()
    return [torch.randint(ENDS, VOCABULARY, (length,), generator=generator).tolist() for length in lengths]


def ours(of: LlamaForCausalLM, asked: list[list[int]], batch: int, tokens: int, ends: list[int]) -> int:
    sampling = Sampling(max_new_tokens=tokens, batch_size=batch)
    found = generate(of, asked, sampling, frozenset(ends), torch.Generator().manual_seed(2))
    return sum(len(response.ids) for response in found)


def theirs(of: LlamaForCausalLM, asked: list[list[int]], batch: int, tokens: int, ends: list[int]) -> int:
    """Batches of prompts of like length, as a user of ``generate`` who cares would make them."""
    made, asked = 0, sorted(asked, key=len)
    for some in (asked[i : i + batch] for i in range(0, len(asked), batch)):
        width = max(map(len, some))
        ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in some])
        found = of.generate(
            ids,
            attention_mask=(ids != 0).long(),
            do_sample=True,
            top_k=0,
            max_new_tokens=tokens,
            eos_token_id=ends or None,
            pad_token_id=0,
        )[:, width:]
        ended = torch.isin(found, torch.tensor(ends, dtype=torch.int64)).int().cumsum(-1)
        made += int((ended.cumsum(-1) <= 1).sum())
    return made


def roof(of: LlamaForCausalLM, asked: list[list[int]], batch: int, tokens: int) -> float:
    """Tokens per second of the processor, if there were nothing but products: of the prompts, and of full steps."""
    layers = [layer.weight for layer in of.model.modules() if isinstance(layer, torch.nn.Linear)]
    read, step = sum(map(len, asked)), [*layers, of.lm_head.weight]
    seconds = products(layers, read) + products(step, batch) * tokens / batch
    return tokens / seconds


def products(weights: list[torch.Tensor], rows: int) -> float:
    """Seconds of the processor, at their best."""
    inputs = {width: torch.randn(rows, width) for width in {weight.shape[1] for weight in weights}}
    times = []
    for _ in range(20):
        began = time.process_time()
        for weight in weights:
            torch.nn.functional.linear(inputs[weight.shape[1]], weight)
        times.append(time.process_time() - began)
    return min(times)


def timed(run: Callable[[], int]) -> tuple[float, float, int]:
    """Tokens per second of the processor, and of the clock; tokens."""
    processor, clock = time.process_time(), time.perf_counter()
    tokens = run()
    return tokens / (time.process_time() - processor), tokens / (time.perf_counter() - clock), tokens


def compare(of: LlamaForCausalLM, batch: int, tokens: int, varied: bool, rounds: int) -> None:
    asked = prompts(4 * batch if varied else batch)
    ends, most = (list(range(1, ENDS + 1)), 4 * tokens) if varied else ([], tokens)
    figures: dict[str, list[tuple[float, float, int]]] = {"ours": [], "generate": []}
    for run in (ours, theirs):  # first calls import, allocate and look things up
        run(of, asked[:2], batch, 2, [])
    for _ in range(rounds):
        for name, run in (("ours", ours), ("generate", theirs)):
            figures[name].append(timed(partial(run, of, asked, batch, most, ends)))
    own, other = ([median(column) for column in zip(*figures[name], strict=True)] for name in figures)
    share = own[0] / roof(of, asked, batch, int(own[2]))
    print(
        f"batch {batch:3} {'varied' if varied else 'uniform':8} ours {own[0]:7.0f} ({own[1]:.0f})   generate {other[0]:7.0f} "
        f"({other[1]:.0f})   ratio {own[0] / other[0]:.2f}   of the roof {share:.2f}",
        flush=True,
    )


def split(of: LlamaForCausalLM, batch: int, tokens: int) -> None:
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU]) as found:
        ours(of, prompts(batch), batch, tokens, [])
    print(found.key_averages().table(sort_by="self_cpu_time_total", row_limit=20, max_name_column_width=50))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batches", default="1,16,64")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--lengths", default="uniform,varied")
    parser.add_argument("--split", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    of = model()
    with torch.no_grad():
        for batch in map(int, arguments.batches.split(",")):
            for lengths in arguments.lengths.split(","):
                compare(of, batch, arguments.tokens, lengths == "varied", arguments.rounds)
            if arguments.split:
                split(of, batch, arguments.tokens)


if __name__ == "__main__":
    main()

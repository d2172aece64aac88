"""Sampling of responses: ours beside transformers' ``generate``, and beside the matrix products that it takes at least.

    python benchmarks/sampling.py [--batches 1,16,64] [--threads 1] [--rounds 3] [--lengths uniform,varied] [--system 0] [--split]

A small random model (7.4M parameters, vocabulary 8,192, fp32), prompts of 8 to 40 tokens. ``uniform``: every response has
--tokens tokens. ``varied``: one in 41 of all tokens ends a response, the same for both, so that lengths are geometric.
Both sample at temperature 1. Ours and theirs take turns; a figure is tokens per second of the processor (of the clock in
brackets), the median of the rounds. The roofs are the products of linear layers alone, by each library that can do them: of the
prompts' tokens, and of as many full steps as the tokens make. --split says where ours spends its time.
--system puts so many tokens before every prompt, the same for all, which the roof reads once; with --tokens 1 that is most of it.

``make bench`` has the same rows in its table. Figures, and what did and did not help, are in docs/benchmarks.md.
"""

import argparse
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import roof
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from trainers.core.generate import generate
from trainers.core.graphs import recorder
from trainers.spec import Sampling

VOCABULARY = 8192
MEAN = 41
"""Tokens of a response of varied length: so small a share of the vocabulary ends one."""
FEWEST = {"uniform": 4, "varied": 8}
"""Prompts. Otherwise as many as rows, and four times as many."""


def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=256, intermediate_size=688, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=1024, tie_word_embeddings=False,
        bos_token_id=None, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def prompts(count: int, vocabulary: int = VOCABULARY, system: int = 0) -> list[list[int]]:
    """Of 8 to 40 tokens, behind so many that all have in common."""
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(8, 41, (count,), generator=generator).tolist()
    least = ends(vocabulary)[-1] + 1
    own = [torch.randint(least, vocabulary, (length,), generator=generator).tolist() for length in lengths]
    common = torch.randint(least, vocabulary, (system,), generator=generator).tolist()
    return [common + prompt for prompt in own]


def ends(vocabulary: int) -> list[int]:
    """Tokens that end a response of varied length."""
    return list(range(1, round(vocabulary / MEAN) + 1))


def ours(of: Any, asked: list[list[int]], batch: int, tokens: int, stops: list[int]) -> int:
    sampling = Sampling(max_new_tokens=tokens, batch_size=batch)
    draw = torch.Generator().manual_seed(2)
    found = generate(of, asked, sampling, frozenset(stops), draw, record=recorder(of.device))
    return sum(len(response.ids) for response in found)


def theirs(of: Any, asked: list[list[int]], batch: int, tokens: int, stops: list[int]) -> int:
    """Batches of prompts of like length, as a user of ``generate`` who cares would make them."""
    made, asked = 0, sorted(asked, key=len)
    for some in (asked[i : i + batch] for i in range(0, len(asked), batch)):
        width = max(map(len, some))
        ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in some], device=of.device)
        found = of.generate(
            ids,
            attention_mask=(ids != 0).long(),
            do_sample=True,
            top_k=0,
            max_new_tokens=tokens,
            eos_token_id=stops or None,
            pad_token_id=0,
        )[:, width:]
        ended = torch.isin(found, torch.tensor(stops, dtype=torch.int64, device=of.device)).int().cumsum(-1)
        made += int((ended.cumsum(-1) <= 1).sum())
    return made


def roofs(of: Any, asked: list[list[int]], batch: int, tokens: int, system: int) -> dict[str, float]:
    """Tokens per second, by what multiplies, if there were nothing but products: of the prompts, and of full steps."""
    layers = [layer.weight for layer in of.model.modules() if isinstance(layer, torch.nn.Linear)]
    read, step = sum(map(len, asked)) - system * (len(asked) - 1), [*layers, of.lm_head.weight]
    return {
        name: tokens / (roof.seconds(layers, read, way) + roof.seconds(step, batch, way) * tokens / batch)
        for name, way in roof.ways(of.device.type).items()
    }


def timed(run: Callable[[], int]) -> list[float]:
    """Tokens per second of the processor, and of the clock; tokens."""
    processor, clock = time.process_time(), time.perf_counter()
    tokens = run()
    return [tokens / (time.process_time() - processor), tokens / (time.perf_counter() - clock), tokens]


def compare(of: Any, batch: int, tokens: int, varied: bool, rounds: int, system: int = 0) -> dict[str, Any]:
    """Both sides' rounds, taking turns, and the roofs of the same work."""
    vocabulary = of.config.vocab_size
    count = max(4 * batch, FEWEST["varied"]) if varied else max(batch, FEWEST["uniform"])
    asked = prompts(count, vocabulary, system)
    stops, most = (ends(vocabulary), 4 * tokens) if varied else ([], tokens)
    figures: dict[str, list[list[float]]] = {"ours": [], "generate": []}
    for run in (ours, theirs):  # first calls import, allocate and look things up
        run(of, asked[: max(2, batch)], batch, 2, [])
    for _ in range(rounds):
        for name, run in (("ours", ours), ("generate", theirs)):
            figures[name].append(timed(partial(run, of, asked, batch, most, stops)))
    made = int(median(found[2] for found in figures["ours"]))
    return {"sides": figures, "roofs": roofs(of, asked, batch, made, system)}


def line(found: dict[str, Any], batch: int, varied: bool) -> str:
    own, other = (
        [median(column) for column in zip(*found["sides"][name], strict=True)] for name in ("ours", "generate")
    )
    best = max(found["roofs"].values())
    above = ", ".join(f"{name} {tokens:.0f}" for name, tokens in found["roofs"].items())
    return (
        f"batch {batch:3} {'varied' if varied else 'uniform':8} ours {own[0]:7.0f} ({own[1]:.0f})   generate {other[0]:7.0f} "
        f"({other[1]:.0f})   ratio {own[0] / other[0]:.2f}   of the roof {own[0] / best:.2f}   roofs: {above}"
    )


def split(of: Any, batch: int, tokens: int) -> None:
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU]) as found:
        ours(of, prompts(batch), batch, tokens, [])
    print(found.key_averages().table(sort_by="self_cpu_time_total", row_limit=20, max_name_column_width=50))


# ---------------------------------------------------------------- a row of make bench


def ready(_: dict[str, Any]) -> None:
    """All is imported."""


@torch.no_grad()
def run(job: dict[str, Any]) -> dict[str, Any]:
    dtype = torch.float32 if job["device"] == "cpu" else torch.bfloat16
    of = LlamaForCausalLM.from_pretrained(Path(job["folder"]) / "model", dtype=dtype).to(job["device"]).eval()
    of.generation_config.eos_token_id = None
    return compare(of, job["batch"], job["tokens"], job["how"] == "varied", job["rounds"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batches", default="1,16,64")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--lengths", default="uniform,varied")
    parser.add_argument("--system", type=int, default=0)
    parser.add_argument("--split", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    of = model()
    with torch.no_grad():
        for batch in map(int, arguments.batches.split(",")):
            for varied in (lengths == "varied" for lengths in arguments.lengths.split(",")):
                found = compare(of, batch, arguments.tokens, varied, arguments.rounds, arguments.system)
                print(line(found, batch, varied), flush=True)
            if arguments.split:
                split(of, batch, arguments.tokens)


if __name__ == "__main__":
    main()

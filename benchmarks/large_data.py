"""A generated data set larger than memory, trained on in every schema: seconds to the first step, tokens/s, memory.

    python benchmarks/large_data.py --gigabytes 10 --steps 40 --folder DIR [--phases sft,dpo]

Each schema is trained on a small set first, then twice on the large one: with nothing known of it, and again as an
attempt after one that was stopped would. What is printed: seconds until the first step is done, by the clock and by the
processor, what was read of files until then, tokens per second from then on, by clock and processor, and the largest
resident set of any process of the phase. All of it includes the helpers; on a machine that does other things beside only the
processor's seconds mean much.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import psutil

SCRATCH = {
    "hiddenSize": 64,
    "numLayers": 2,
    "maxPositions": 1024,
    "tokenizer": {"kind": "bytes", "vocabSize": 2048},
}


def texts(rng: np.random.Generator, count: int, mean: int) -> list[str]:
    """Texts of words of a few letters each, log-normally long."""
    letters = "".join(map(chr, rng.integers(97, 123, 5000)))
    words = [letters[i : i + n] for i, n in zip(rng.integers(0, 4990, 4000), rng.integers(2, 10, 4000), strict=True)]
    lengths = np.maximum(3, rng.lognormal(np.log(mean), 0.6, count)).astype(int)
    picked = rng.integers(0, len(words), lengths.sum())
    ends = np.cumsum(lengths)
    return [" ".join(words[i] for i in picked[end - n : end]) for end, n in zip(ends, lengths, strict=True)]


def rows(schema: str, rng: np.random.Generator, count: int) -> list[dict[str, object]]:
    prompts, first, second = texts(rng, count, 30), texts(rng, count, 100), texts(rng, count, 100)
    if schema == "sft":
        return [{"prompt": p, "response": a} for p, a in zip(prompts, first, strict=True)]
    if schema == "preference":
        return [{"prompt": p, "chosen": a, "rejected": b} for p, a, b in zip(prompts, first, second, strict=True)]
    if schema == "traces":
        rewards = rng.random(count).tolist()
        return [
            {"prompt": p, "teacher_response": a, "reward": r} for p, a, r in zip(prompts, first, rewards, strict=True)
        ]
    return [{"prompt": f"{p} {a}"} for p, a in zip(prompts, first, strict=True)]


def write(path: Path, schema: str, size: int) -> None:
    """Rows of 4,000 different ones, a number in front of each, until the file has ``size`` bytes or a little more."""
    lines = [json.dumps(row) for row in rows(schema, np.random.default_rng(0), 4000)]
    key = '"prompt": "'
    block = b""
    for first in range(0, 64 * len(lines), len(lines)):
        block += "".join(line.replace(key, f"{key}{first + i} ", 1) + "\n" for i, line in enumerate(lines)).encode()
        if len(block) >= size:
            break
    with path.open("wb") as file:  # what is larger repeats itself: nothing looks for rows that are alike
        while file.tell() < size:
            file.write(block)


def spec_for(phase: str, data: Path, steps: int, model: str) -> dict[str, object]:
    source = [{"files": str(data)}]
    training = {"batchSize": 16, "duration": {"maxSteps": steps}, "parallel": {"microBatchTokens": 1024}}
    prompts = {"data": {"prompts": source, "maxPromptLength": 512}}
    pairs = {"data": {"train": source}, **training}
    sampling = {"maxNewTokens": 8, "batchSize": 16}
    distilled = {"traces": {"files": str(data)}, "onPolicyFraction": 0, "maxLength": 512, "weighting": {"mode": "none"}}
    judge = {"rewardModel": {"source": f"{model}-reward"}}
    perplexity = {"benchmarks": [{"name": "p", "perplexity": {}}], "latency": {"enabled": False}}
    specs: dict[str, dict[str, object]] = {
        "sft": {"model": {"source": model}, **pairs},
        "reward": {"model": {"source": model}, **pairs},
        "dpo": {"policy": {"source": model}, "referenceScores": "on-the-fly", **pairs},
        "distill": {"teacher": {"source": model}, "student": {"source": model}, **distilled, **training},
        "ppo": {
            "policy": {"source": model}, **judge, **prompts, "sampling": {"maxNewTokens": 8}, "iterations": steps, "batchSize": 16
        },
        "rollout": {"policy": {"source": model}, **prompts, "sampling": sampling},
        "evaluate": {"models": [{"name": "m", "source": model}], "data": {"rows": source}, **perplexity},
    }  # fmt: skip
    return specs[phase]


PHASES = {
    "sft": "sft",
    "reward": "preference",
    "dpo": "preference",
    "distill": "traces",
    "ppo": "prompt",
    "rollout": "prompt",
    "evaluate": "sft",
}
"""With the schema of their rows."""

UNENDING = ("rollout", "evaluate")
"""Every row is used: they are stopped after as many steps, or blocks, as the others make."""


def models(folder: Path, text: Path) -> str:
    """A small model and a reward model of its shape."""
    from transformers import AutoModelForSequenceClassification

    from trainers.core.scratch import scratch_model
    from trainers.spec import ScratchModel

    document = {**SCRATCH, "tokenizer": {**SCRATCH["tokenizer"], "trainOn": [{"files": str(text), "limit": 2000}]}}
    model, tokenizer = scratch_model(ScratchModel.model_validate(document), 0, folder)
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    scorer = AutoModelForSequenceClassification.from_pretrained(folder / "model", num_labels=1)
    scorer.save_pretrained(folder / "model-reward")
    tokenizer.save_pretrained(folder / "model-reward")
    return str(folder / "model")


def run(phase: str, spec: dict[str, object], output: Path, steps: int) -> dict[str, float]:
    output.parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(output, ignore_errors=True)
    file = output.with_suffix(".json")
    file.write_text(json.dumps({"output": str(output), "spec": spec}))
    started = time.time()
    process = psutil.Popen(
        [sys.executable, "-m", "trainers", phase, "--spec", str(file)],
        env={**os.environ, "ALIGNMENT_METRICS_PORT": "0"},
        stdout=subprocess.DEVNULL,
    )
    peak = 0
    spent: dict[int, float] = {}
    read = 0.0
    while process.poll() is None:
        peak = max([peak, *sizes(process)])
        made = times(phase, output)
        if made and len(made) not in spent:
            read = read or read_bytes(process)
            spent[len(made)] = cpu_seconds(process)
        if phase in UNENDING and len(made) >= steps:
            process.terminate()
            process.wait()
        time.sleep(0.2)
    if process.returncode not in ((0, 143) if phase in UNENDING else (0,)):
        raise SystemExit(f"{phase} ended with {process.returncode}")
    if phase == "evaluate":
        return evaluated(times(phase, output), started, spent, peak) | {"read until then, MB": round(read / 1e6)}
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    settled = lines[len(lines) // 4 :]
    seconds = settled[-1]["time"] - settled[0]["time"]
    return {
        "first step after, s": round(lines[0]["time"] - started, 1),
        "processor seconds until then": round(spent[min(spent)], 1),
        "read until then, MB": round(read / 1e6),
        "whole, s": round(time.time() - started, 1),
        "tokens/s": round(sum(line["tokens"] for line in settled[1:]) / seconds),
        "tokens per processor second": round(rate(lines, spent)),
        "of that waiting for data, %": round(100 * sum(line["seconds_data"] for line in settled[1:]) / seconds, 2),
        "largest resident set, MB": round(peak / 1e6),
    }


def rate(lines: list[dict[str, float]], spent: dict[int, float]) -> float:
    """Tokens of the steps from the first quarter on per processor second that was spent meanwhile."""
    seen = [count for count in sorted(spent) if count > len(lines) // 4]
    if len(seen) < 2:
        return 0.0
    tokens = sum(line["tokens"] for line in lines[seen[0] : seen[-1]])
    return tokens / max(spent[seen[-1]] - spent[seen[0]], 1e-9)


def times(phase: str, output: Path) -> list[float]:
    """When each step was done; of an evaluation, each block of rows."""
    if phase == "evaluate":
        return sorted(path.stat().st_mtime for path in (output / "cells").glob("losses-*"))
    file = output / "metrics.jsonl"
    return (
        [json.loads(line)["time"] for line in file.read_text().splitlines(True) if line[-1] == "\n"]
        if file.exists()
        else []
    )


def evaluated(made: list[float], started: float, spent: dict[int, float], peak: int) -> dict[str, float]:
    return {
        "first block after, s": round(made[0] - started, 1),
        "processor seconds until then": round(spent[min(spent)], 1),
        "processor seconds for a block": round((max(spent.values()) - min(spent.values())) / max(len(spent) - 1, 1), 2),
        "seconds for a block of 512 rows": round((made[-1] - made[0]) / max(len(made) - 1, 1), 2),
        "largest resident set, MB": round(peak / 1e6),
    }


def cpu_seconds(process: psutil.Popen) -> float:
    """Of the process and its helpers, also those that have ended."""
    return summed(process, lambda one: sum(one.cpu_times()[:4]))


def read_bytes(process: psutil.Popen) -> float:
    """By reading files, from the disk or the system's cache; libraries that Python loads are among them."""
    return summed(process, lambda one: one.io_counters().read_chars)


def summed(process: psutil.Popen, of: Callable[[psutil.Process], float]) -> float:
    found = 0.0
    for one in (process, *process.children(recursive=True)):
        with suppress(psutil.NoSuchProcess):
            found += of(one)
    return found


def sizes(process: psutil.Popen) -> list[int]:
    found = []
    for one in (process, *process.children(recursive=True)):
        try:
            found.append(one.memory_info().rss)
        except psutil.NoSuchProcess:
            continue
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--gigabytes", type=float, default=1.0)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--phases", default=",".join(PHASES))
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    write(args.folder / "words.jsonl", "sft", 10**6)
    model = models(args.folder, args.folder / "words.jsonl")
    for phase in args.phases.split(","):
        small, large = args.folder / f"{phase}-small.jsonl", args.folder / f"{phase}-large.jsonl"
        write(small, PHASES[phase], 10**6)
        write(large, PHASES[phase], int(args.gigabytes * 1e9))
        os.environ["XDG_CACHE_HOME"] = str(args.folder / "cache")
        shutil.rmtree(
            args.folder / "runs" / ".rows", ignore_errors=True
        )  # of a phase before with rows of the same schema
        for name, data in (("small", small), ("large", large), ("large, again", large)):
            found = run(
                phase, spec_for(phase, data, args.steps, model), args.folder / "runs" / "run" / phase, args.steps
            )
            print(f"{phase} {name}: {found}", flush=True)
        large.unlink()


if __name__ == "__main__":
    main()

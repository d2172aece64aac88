"""What only a GPU can show, in a quarter of an hour on one, as a report: ``make gpu-check``.

    python benchmarks/gpu_check.py [--report gpu-check.md] [--only PATTERN] [--steps 10]

The same phases on the same rows in every setting that has kernels or memory of its own: attention, compilation,
sharding, offloading, checkpointing, adapters, types. For each: whether it runs, how far its losses are from those of the
plain setting, tokens per second without the first two steps, and the peak of the device's memory beside what the phase said
it would need. Some are run twice, to see whether they leave the same bits, which a resumed run's being the uninterrupted one
rests on. Then one process of two is killed (on two GPUs), steps of sampling as CUDA graphs are set beside steps without, and
losses on a head beside torch's and Liger's. Without a GPU the models are tiny and memory is not compared.
"""

import argparse
import fnmatch
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

ROOT = Path(__file__).parents[1]
ON_GPU = torch.cuda.is_available()
ROWS = 512
LAYERS, WIDTH, LONGEST = (24, 1024, 2048) if ON_GPU else (2, 64, 128)
TOKENS = 16384 if ON_GPU else 512
BOUND = 2e-2
"""Relative difference of losses in bf16 that rounding explains."""
PARTS = {"Sampling with CUDA graphs": "benchmarks/gpu_graphs.py", "Losses on a head": "benchmarks/gpu_heads.py"}
SECONDS = 60
"""That two processes may go on after one is killed: torchrun kills by itself after 30."""

PHASE = """
import json, os, sys, torch
from pathlib import Path
from trainers import launch
torch.use_deterministic_algorithms("CUBLAS_WORKSPACE_CONFIG" in os.environ)
code = launch.run_phase(sys.argv[1], Path(sys.argv[2]), [])
peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
print("PEAK", json.dumps(peak))
sys.exit(code)
"""


@dataclass(frozen=True)
class Cell:
    """A phase in a setting."""

    name: str
    phase: str = "sft"
    parallel: dict[str, Any] = field(default_factory=dict)
    changes: dict[str, Any] = field(default_factory=dict)
    like: str = "sft"
    """The cell whose losses it should have; its own name for one that is compared with nothing."""
    twice: bool = False
    """Run again, to compare bits."""
    deterministic: bool = False
    """With torch's deterministic algorithms, which are slower and which a phase does not ask for."""

    @property
    def needs_gpu(self) -> bool:
        return self.parallel.get("attention") in ("varlen", "flash", "flex")


CELLS = (
    Cell("sft", twice=True),
    Cell("sft, deterministic", twice=True, deterministic=True),
    *(
        Cell(f"sft, {kind} attention", parallel={"attention": kind}, twice=True)
        for kind in ("sdpa", "eager", "varlen", "flash", "flex")
    ),
    Cell("sft, compiled", parallel={"compile": True}, twice=True),
    *(Cell(f"sft, {kind} compiled", parallel={"attention": kind, "compile": True}) for kind in ("varlen", "flex")),
    Cell("sft, checkpointed", parallel={"gradientCheckpointing": True}),
    Cell("sft, fsdp", parallel={"strategy": "fsdp"}),
    Cell("sft, fsdp offloaded", parallel={"strategy": "fsdp", "fsdp": {"cpuOffload": True}}),
    Cell("sft, fsdp compiled", parallel={"strategy": "fsdp", "compile": True}),
    *(Cell(f"sft, ZeRO-{n}", parallel={"strategy": "deepspeed", "deepspeed": {"stage": n}}) for n in (1, 2, 3)),
    Cell("sft, fp32", parallel={"precision": "fp32"}),
    Cell("sft, weights in bf16", changes={"dtype": "bf16"}),
    Cell("sft, adapters", changes={"lora": {"rank": 16}}, like="sft, adapters"),
    Cell("dpo", "dpo", like="dpo"),
    Cell("dpo, fsdp, frozen offloaded", "dpo", {"strategy": "fsdp", "frozen": "offloaded"}, like="dpo"),
    Cell("distill", "distill", like="distill"),
    Cell("distill, fsdp", "distill", {"strategy": "fsdp"}, like="distill"),
)


def main() -> int:
    options = _options()
    with tempfile.TemporaryDirectory(prefix="gpu-check-") as folder:
        made = make_inputs(Path(folder))
        top, results = [*heading(), ""], dict[str, dict[str, Any]]()
        cells = [cell for cell in CELLS if options.only is None or fnmatch.fnmatch(cell.name, options.only)]
        if not ON_GPU:
            print("left out, as they need a GPU:", "; ".join(cell.name for cell in cells if cell.needs_gpu))
            cells = [cell for cell in cells if not cell.needs_gpu]
        print(
            f"{top[2]}: {len(cells)} settings, then a kill, graphs and heads; after each, {options.report} has what is known"
        )
        for cell in cells:
            results[cell.name] = found = run_cell(cell, made, options.steps)
            print(cell.name, found.get("problem", "ok"), flush=True)
            report(options.report, [*top, *table(results)])
        end = killed(made) if options.only is None else "Left out."
    lines = [*top, *table(results), "", "## One process of two is killed", "", end]
    report(options.report, lines)
    wrong = end.startswith("PROBLEM")
    for title, script in PARTS.items() if options.only is None else ():
        text, well = part(script)
        lines += ["", f"## {title}", "", text]
        report(options.report, lines)
        wrong = wrong or not well
    return int(wrong or any("problem" in found or found.get("apart", 0) > BOUND for found in results.values()))


def report(path: str, lines: list[str]) -> None:
    """Anew after each result: a GPU that is lent for a quarter of an hour may go before the end."""
    Path(path).write_text("\n".join(lines) + "\n")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--report", default="gpu-check.md")
    parser.add_argument("--only", help="names of settings, such as 'sft, fsdp*'")
    parser.add_argument("--steps", type=int, default=10)
    return parser.parse_args()


def heading() -> list[str]:
    device = torch.cuda.get_device_name() if ON_GPU else "no GPU: tiny models on the CPU"
    return ["# GPU check", "", f"{device}; torch {torch.__version__}; {LAYERS} layers of width {WIDTH}"]


def make_inputs(folder: Path) -> dict[str, str]:
    """Rows of log-normal length, as preferences have, and the specs' shared model."""
    rng = np.random.default_rng(0)
    words = ["".join(chr(97 + c) for c in rng.integers(0, 26, rng.integers(2, 8))) for _ in range(2000)]

    def text(mean: int) -> str:
        count = int(np.clip(rng.lognormal(np.log(mean), 0.8), 3, LONGEST // 16))
        return " ".join(words[i] for i in rng.integers(0, len(words), count))

    rows = [{"prompt": text(20), "response": text(60)} for _ in range(ROWS)]
    pairs = [{"prompt": row["prompt"], "chosen": row["response"], "rejected": text(60)} for row in rows]
    for name, some in (("rows", rows), ("pairs", pairs)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some))
    return {name: str(folder / f"{name}.jsonl") for name in ("rows", "pairs")} | {"folder": str(folder)}


def spec(cell: Cell, made: dict[str, str], steps: int) -> dict[str, Any]:
    tokenizer = {"kind": "bytes", "vocabSize": 8192, "trainOn": [{"files": made["rows"]}]}
    scratch = {"hiddenSize": WIDTH, "numLayers": LAYERS, "numHeads": max(4, WIDTH // 64), "maxPositions": LONGEST}
    changes = dict(cell.changes)
    model = {"scratch": scratch | {"tokenizer": tokenizer}} | (
        {"dtype": changes.pop("dtype")} if "dtype" in changes else {}
    )
    rows = {"train": [{"files": made["pairs" if cell.phase == "dpo" else "rows"]}], "maxLength": LONGEST}
    common = {
        "batchSize": 64 if ON_GPU else 8, "duration": {"maxSteps": steps}, "checkpoint": {"everySeconds": None},
        "parallel": {"precision": "bf16", "microBatchTokens": TOKENS} | cell.parallel,
    }  # fmt: skip
    if cell.phase == "distill":
        prompts = {"prompts": [{"files": made["rows"]}], "maxPromptLength": LONGEST // 2}
        common |= {"sampling": {"maxNewTokens": LONGEST // 16}, "maxLength": LONGEST, "onPolicyFraction": 1}
        return common | {"teacher": model, "student": {"teacherLayers": [0, LAYERS - 1]}, "prompts": prompts} | changes
    return common | {"policy" if cell.phase == "dpo" else "model": model, "data": rows} | changes


def run_cell(cell: Cell, made: dict[str, str], steps: int) -> dict[str, Any]:
    """What is found of a cell; if it is run twice, whether losses and weights are the same ``bits``."""
    found = run(cell, made, steps)
    if not cell.twice or "problem" in found:
        return found
    again = run(cell, made, steps)
    same = all(found[name] == again.get(name) for name in ("losses", "digest"))
    return found | {"bits": "the same" if same else "others"}


def run(cell: Cell, made: dict[str, str], steps: int) -> dict[str, Any]:
    """What a phase's own output says of it."""
    output = Path(made["folder"]) / re.sub(r"\W+", "-", cell.name) / "run" / "phase"
    output.parent.mkdir(parents=True, exist_ok=True)
    file = output.with_suffix(".yaml")
    file.write_text(yaml.safe_dump({"output": str(output), "inputs": {}, "spec": spec(cell, made, steps)}))
    began = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", PHASE, cell.phase, str(file)],
        env=environment(cell), cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    found: dict[str, Any] = {"like": cell.like, "seconds": time.perf_counter() - began}
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        return found | {"problem": lines[-1][:200] if lines else f"exit code {done.returncode}"}
    log = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    log = [line for line in log if "loss" in line]
    artifacts = json.loads((output / "result.json").read_text())["artifacts"]
    said = re.search(r"memory on a device:.*; ([\d.]+) GiB", done.stdout)
    shutil.rmtree(output, ignore_errors=True)
    return found | {
        "losses": [line["loss"] for line in log],
        "digest": artifacts["model"]["digest"],
        "speed": sum(line["tokens"] for line in log[2:]) / max(log[-1]["time"] - log[1]["time"], 1e-9),
        "peak": int(done.stdout.rsplit("PEAK ", 1)[-1]) / 2**30,
        "said": float(said.group(1)) if said else float("nan"),
    }


def environment(cell: Cell) -> dict[str, str]:
    exact = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"} if cell.deterministic else {}
    return os.environ | {"ALIGNMENT_METRICS_PORT": "0", **exact}


def table(results: dict[str, dict[str, Any]]) -> list[str]:
    """One line for each cell; adds how far its losses are ``apart`` from those it should have."""
    columns = ("setting", "losses apart", "bits of a second run", "tokens/s", "peak GiB", "said GiB", "")
    lines = [f"| {' | '.join(columns)} |", "| --- " * len(columns) + "|"]
    for name, found in results.items():
        if "problem" in found:
            lines.append(f"| {name} | | | | | | {found['problem'].replace('|', '/')} |")
            continue
        other = results.get(found["like"], found)
        found["apart"] = apart(found["losses"], other.get("losses", found["losses"]))
        bits = f"{found['apart']:.1e} | {found.get('bits', '')}"
        numbers = f"{bits} | {found['speed']:,.0f} | {found['peak']:.2f} | {found['said']:.2f}"
        lines.append(f"| {name} | {numbers} | {'ok' if found['apart'] <= BOUND else 'TOO FAR'} |")
    return lines


def apart(ours: list[float], theirs: list[float]) -> float:
    """The largest relative difference between two rows of losses."""
    return max(abs(a - b) / max(abs(b), 1e-3) for a, b in zip(ours, theirs, strict=True))


def killed(made: dict[str, str]) -> str:
    """How two processes end when one of them is killed in its third step: NCCL's watchdog is what only GPUs have."""
    if ON_GPU and torch.cuda.device_count() < 2:
        return "Left out: it takes two GPUs."
    cell = Cell("killed", parallel={"strategy": "ddp"})
    file, word = (Path(made["folder"]) / f"killed.{suffix}" for suffix in ("yaml", "word"))
    output = str(Path(made["folder"]) / "killed" / "run" / "phase")
    file.write_text(yaml.safe_dump({"output": output, "inputs": {}, "spec": spec(cell, made, steps=400)}))
    launcher = [sys.executable, "-m", "trainers.agent", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*launcher, "tests/trainers/distributed/dying.py", "sft", str(file), "1=SIGKILL"],
        env=environment(cell) | {"ALIGNMENT_TERMINATION_LOG": str(word)}, cwd=ROOT, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    died = file.with_suffix(".died")
    if not (died.exists() and word.exists()):
        return f"PROBLEM: {done.stderr[-500:]}"
    took, said = time.time() - died.stat().st_mtime, json.loads(word.read_text())
    well = took < SECONDS and said["failure"] == "Infrastructure" and "rank 1" in said["message"]
    return f"{'ok' if well else 'PROBLEM'}: over {took:.0f} s later, as {said['failure']}: {said['message']}"


def part(script: str) -> tuple[str, bool]:
    """What a benchmark prints, in a process of its own, and whether it found all well."""
    done = subprocess.run([sys.executable, script], cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stdout + done.stderr[-2000:] * bool(done.returncode), done.returncode == 0


if __name__ == "__main__":
    sys.exit(main())

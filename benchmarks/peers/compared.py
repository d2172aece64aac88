"""Ours beside TRL, on the same model, tokens and batches, taking turns; writes the table in docs/benchmarks.md.

    python benchmarks/peers [--only sft,ppo] [--batches 8,32] [--rounds 3] [--size small] [--device cpu] [--write make-target]

The peers are installed once, into an environment of their own outside of the tree. Both sides are given the same rows in the
same order; before a figure is worth anything, the first step's losses must agree where both compute the same one. A figure is
tokens per second of the processor: real ones, padding left out, of both responses of a pair; where responses are sampled, those
sampled. It is the median of the rounds, with the least and the most.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from environment import installed, versions
from table import Side, Work, render, spliced
from work import SIZES, make, order

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs/benchmarks.md"
KINDS = ("sft", "reward", "dpo", "traces", "samples", "ppo")
STEPS = {"samples": 6, "ppo": 4}
OTHERWISE = 8
SAME_LOSS = ("sft", "reward", "dpo", "traces")
"""Work whose first loss is a function of the rows alone."""
TOLERANCE = {"cpu": 1e-4, "cuda": 2e-2}
"""Of losses, as a share: fp32 and bf16."""


class Worker:
    """One side's process, which does a job at a time."""

    def __init__(self, side: str, python: str, path: str, threads: int) -> None:
        environment = os.environ | {
            "PYTHONPATH": path, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false",
            "TRL_EXPERIMENTAL_SILENCE": "1",
        }  # fmt: skip
        command = [python, str(Path(__file__).with_name("worker.py")), side]
        self.log = tempfile.TemporaryFile("w+")  # noqa: SIM115 - open as long as the process is
        self.process = subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log, text=True
        )
        self.imports = self._answer()["imports"]

    def do(self, job: dict[str, Any]) -> dict[str, Any]:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        return self._answer() | {"imports": self.imports}

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        found = json.loads(line) if line else {"error": "it ended"}
        if "error" in found:
            self.log.seek(0)
            sys.exit(f"{found['error']}\n{self.log.read()[-3000:]}")
        return found


class Peers:
    """Ours, and the peers of each kind of work; processes that are started when they are wanted."""

    def __init__(self, folder: Path, threads: int) -> None:
        self.folder, self.threads = folder, threads
        self.workers: dict[str, Worker] = {}

    def names(self, kind: str) -> list[str]:
        """The sides of a kind of work. Grouping by length is TRL's best for SFT, and its default does without."""
        return ["ours", "trl-ppo"] if kind == "ppo" else ["ours", "trl", *(["trl grouped"] if kind == "sft" else [])]

    def do(self, name: str, job: dict[str, Any]) -> dict[str, Any]:
        release = name.partition(" ")[0]
        if release not in self.workers:
            self.workers[release] = self._worker(release)
        return self.workers[release].do(job | {"grouped": name.endswith("grouped")})

    def _worker(self, release: str) -> Worker:
        if release == "ours":
            return Worker("ours", sys.executable, str(ROOT), self.threads)
        return Worker("theirs", str(self.folder / "bin/python"), str(self.folder / release), self.threads)


def compare(peers: Peers, kind: str, batch: int, given: argparse.Namespace, rows: Path) -> Work:
    steps = given.steps or STEPS.get(kind, OTHERWISE)
    work = Work(kind, batch, given.device, {name: Side() for name in peers.names(kind)})
    with tempfile.TemporaryDirectory() as out:
        job = {
            "kind": kind, "batch": batch, "steps": steps, "tokens": given.tokens, "folder": str(rows), "out": f"{out}/out",
            "order": order(batch, steps), "device": given.device,
        }  # fmt: skip
        for _ in range(given.rounds):
            for name, side in work.sides.items():
                side.rounds.append(peers.do(name, job))
    _check(work, given.device)
    return work


def _check(work: Work, device: str) -> None:
    """End where two losses that should be one are not, or tokens are others."""
    if work.kind not in SAME_LOSS:
        return
    counts = {name: work.sides[name].rounds[0]["marks"][-1][2] for name in ("ours", "trl")}
    if len(set(counts.values())) > 1:
        sys.exit(f"{work.kind}: the sides have not had the same tokens: {counts}")
    ours, theirs = work.sides["ours"].loss, work.sides["trl"].loss
    print(f"  first losses: {work.losses()}", flush=True)
    if ours is None or theirs is None or abs(ours - theirs) > TOLERANCE[device] * max(1, abs(theirs)):
        sys.exit(f"{work.kind}: the first step's losses differ, so nothing can be compared: {work.losses()}")


def parsed(words: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="benchmarks/peers", description=__doc__.splitlines()[0])
    parser.add_argument("--only", type=lambda text: _known(text.split(",")), default=KINDS)
    parser.add_argument("--batches", type=lambda text: [int(word) for word in text.split(",")], default=[8, 32])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--tokens", type=int, default=64, help="new ones of each response that is sampled")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--write", help="the make target in whose place in docs/benchmarks.md the table goes")
    return parser.parse_args(words)


def _known(kinds: list[str]) -> list[str]:
    if unknown := [kind for kind in kinds if kind not in KINDS]:
        raise argparse.ArgumentTypeError(f"{', '.join(unknown)}: there are {', '.join(KINDS)}")
    return kinds


def heading(folder: Path, words: list[str], size: str) -> str:
    import torch
    import transformers

    shape, peers = SIZES[size], versions(folder)
    programs = f"torch {torch.__version__.split('+')[0]}, transformers {transformers.__version__}, TRL {peers['trl']}"
    return (
        f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC, `python benchmarks/peers {' '.join(words)}`: {_processor()}, {os.cpu_count()} "
        f"cores, load {os.getloadavg()[2]:.0f}; {programs}, for PPO {peers['trl-ppo']}. A Llama of width {shape.hidden}, "
        f"{shape.layers} layers and {shape.embedded:,} tokens. Medians of the rounds (least–most)."
    )


def _processor() -> str:
    cpus = Path("/proc/cpuinfo")
    names = (
        [line.split(":")[1].strip() for line in cpus.read_text().splitlines() if "model name" in line]
        if cpus.is_file()
        else []
    )
    return names[0] if names else platform.processor()


def main(words: list[str]) -> None:
    given = parsed(words)
    folder = installed()
    rows = folder.parent / f"work-{given.size}"
    make(rows, SIZES[given.size])
    peers, works = Peers(folder, given.threads), []
    for kind in given.only:
        for batch in given.batches:
            print(f"{kind}, batch {batch}", flush=True)
            works.append(compare(peers, kind, batch, given, rows))
            print(f"  {works[-1].line()}", flush=True)
    made = f"{heading(folder, words, given.size)}\n\n{render(works, given.device)}"
    print(f"\n{made}")
    if given.write:
        PAGE.write_text(spliced(PAGE.read_text(), given.write, made))

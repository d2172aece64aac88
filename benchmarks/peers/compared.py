"""Ours beside TRL, on the same model, tokens and batches, taking turns; writes the tables in docs/benchmarks.md.

    python benchmarks/peers [--only sft,sampling] [--batches 8,32] [--rounds 3] [--size small] [--device cpu] [--resume]
      [--write make-target]

The peers are installed once, into an environment of their own outside of the tree. Both sides are given the same rows in the
same order; before a figure is worth anything, the losses of the steps must agree where both compute the same ones. A figure is
tokens per second of the processor, and of the clock: real ones, padding left out, of both responses of a pair; where responses
are sampled, those sampled. It is the median of the rounds, with the least and the most.

A row is printed and kept as soon as it is done. One that fails is told, and the others go on; --resume takes what is there.
"""

import argparse
import os
import platform
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from statistics import median

from environment import installed, versions
from figures import CLOCK, PROCESSOR, WARM_UP, Sampled, Side, Work
from kept import Kept, code
from table import render, sampling, speed, spliced
from tasks import KINDS, SAME_LOSSES, How, tasks
from work import SIZES, make
from workers import ROOT, FailedError, Peers

PAGE = ROOT / "docs/benchmarks.md"


def main(words: list[str]) -> None:
    given = parsed(words)
    folder = installed()
    how = How(given.device, given.rounds, given.tokens, given.steps, folder.parent / f"work-{given.size}")
    make(how.folder, SIZES[given.size])
    peers = Peers(folder, given.threads, given.device)
    settings = {"peers": folder.name, "code": code(), "threads": given.threads, "how": str(how)}
    kept = Kept(folder.parent / f"rows-{given.size}-{given.device}.jsonl", settings, given.resume)
    found, failed = compare(given, how, peers, kept)
    peers.close()
    works, sampled = [w for w in found if isinstance(w, Work)], [s for s in found if isinstance(s, Sampled)]
    made = f"{heading(folder, words, given, works)}\n\n{render(works, sampled, given.device)}"
    print(f"\n{made}")
    if given.write:
        _publish(given, made, failed)
    if failed:
        sys.exit(f"not measured, see above: {', '.join(failed)}; --resume tries these alone")


def _publish(given: argparse.Namespace, made: str, failed: list[str]) -> None:
    """The page's tables are of one whole run: a part, or one for trying things out, would take the place of what is there."""
    if failed or not _is_whole(given):
        print(f"\n{PAGE.name} stays as it is: its tables are of all rows, with no fewer rounds or steps than usual")
    else:
        PAGE.write_text(spliced(PAGE.read_text(), given.write, made))


def _is_whole(given: argparse.Namespace) -> bool:
    usual = parsed([])
    rows = all(
        getattr(given, name) == getattr(usual, name) for name in ("only", "batches", "rows", "size", "device", "steps")
    )
    return rows and given.rounds >= 2


def compare(given: argparse.Namespace, how: How, peers: Peers, kept: Kept) -> tuple[list[Work | Sampled], list[str]]:
    """All rows that could be measured, and the names of the others."""
    done: list[Work | Sampled] = []
    failed: list[str] = []
    for task in tasks(given.only, given.batches, given.rows):
        began = time.perf_counter()
        print(f"{datetime.now(UTC):%H:%M} {task.name}", flush=True)
        try:
            found = kept.row(task.name) or kept.add(task.name, task.measured(peers, how))
        except FailedError as error:
            print(f"{task.name} failed: {error}", flush=True)
            failed.append(task.name)
            continue
        done.append(task.read(found))
        print("\n".join(_lines(done[-1], given.device)), f" {time.perf_counter() - began:.0f} s", flush=True)
    return done, failed


def _lines(row: Work | Sampled, device: str) -> list[str]:
    column = PROCESSOR if device == "cpu" else CLOCK
    return speed(row, column) if isinstance(row, Work) else sampling(row, column)


def parsed(words: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="benchmarks/peers", description=__doc__.splitlines()[0])
    parser.add_argument("--only", type=lambda text: _known(text.split(",")), default=list(KINDS))
    parser.add_argument("--batches", type=_numbers, default=[8, 32])
    parser.add_argument(
        "--rows", type=_numbers, default=[1, 16, 64], help="sampled side by side, by nothing but sampling"
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, help="of which the first two are left out")
    parser.add_argument("--tokens", type=int, default=64, help="new ones of each response that is sampled")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument(
        "--resume", action="store_true", help="take rows that the last run, of the same code and settings, has"
    )
    parser.add_argument("--write", help="the make target in whose place in docs/benchmarks.md the tables go")
    given = parser.parse_args(words)
    if given.steps is not None and given.steps <= WARM_UP:
        parser.error(f"--steps {given.steps}: at least {WARM_UP + 1}, since the first {WARM_UP} are left out")
    return given


def _numbers(text: str) -> list[int]:
    return [int(word) for word in text.split(",")]


def _known(kinds: list[str]) -> list[str]:
    if unknown := [kind for kind in kinds if kind not in KINDS]:
        raise argparse.ArgumentTypeError(f"{', '.join(unknown)}: there are {', '.join(KINDS)}")
    return kinds


def heading(folder: Path, words: list[str], given: argparse.Namespace, works: list[Work]) -> str:
    """What was measured, on what, and by which command."""
    import torch
    import transformers

    shape, peers = SIZES[given.size], versions(folder)
    programs = f"torch {torch.__version__.split('+')[0]}, transformers {transformers.__version__}, TRL {peers['trl']}"
    text = (
        f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC, `python benchmarks/peers {' '.join(words)}`: {_processor()}, {os.cpu_count()} "
        f"cores, load {os.getloadavg()[2]:.0f}; {programs}, for PPO {peers['trl-ppo']}. A Llama of width {shape.hidden}, "
        f"{shape.layers} layers and {shape.embedded:,} tokens, {given.threads} thread{'s' * (given.threads > 1)}. Medians of "
        f"{given.rounds} rounds (least–most)."
    )
    return f"{text} {_said_of(works)}".strip()


def _said_of(works: list[Work]) -> str:
    """How far losses agree, and what imports hold."""
    if not works:
        return ""
    ours, theirs = (median(side.held for work in works for side in _sides(work, own)) for own in (True, False))
    held = f"Imports hold {ours:.0f} MB of ours and {theirs:.0f} of TRL's."
    same = [work.residual() for work in works if work.kind in SAME_LOSSES]
    return f"Losses of all steps agree within {max(same):.0e}. {held}" if same else held


def _sides(work: Work, own: bool) -> list[Side]:
    return [side for name, side in work.sides.items() if (name == "ours") == own]


def _processor() -> str:
    cpus = Path("/proc/cpuinfo")
    lines = cpus.read_text().splitlines() if cpus.is_file() else []
    return next((line.split(":")[1].strip() for line in lines if "model name" in line), platform.processor())

"""Start one phase: ``torchrun … -m trainers TYPE --spec FILE`` (or plain ``python -m trainers`` for one process)."""

import argparse
import warnings
from pathlib import Path

import yaml

from trainers.ending import exit_with
from trainers.phases import REGISTRY

LIBRARIES_TO_EACH_OTHER = r"`(torch\.distributed\.\w+|is_gradient_checkpointing|broadcast_buffers)` is deprecated"
"""Calls of libraries' own, about which a user can do nothing: ZeRO's third stage made 1,100 lines of it in 140 steps."""


def main() -> int:
    warnings.filterwarnings("ignore", LIBRARIES_TO_EACH_OTHER, FutureWarning)
    parser = argparse.ArgumentParser(prog="trainers", description=__doc__)
    parser.add_argument("type", choices=[entry.name for entry in REGISTRY])
    parser.add_argument("--spec", type=Path, required=True, help="phase file, YAML or JSON (trainers/contract.py)")
    parser.add_argument("--set", action="append", default=[], metavar="PATH=VALUE", help="change a setting of the spec")
    parser.add_argument(
        "--max-new-tokens", type=int, help="for rollout; 1 only checks that prompts tokenise as they should"
    )
    args = parser.parse_args()
    changes = [_change(text) for text in args.set]
    if args.max_new_tokens is not None:
        changes.append(("sampling.maxNewTokens", args.max_new_tokens))
    from trainers.launch import run_phase

    return run_phase(args.type, args.spec, changes)


def _change(text: str) -> tuple[str, object]:
    path, separator, value = text.partition("=")
    if not separator:
        raise SystemExit(f"--set {text}: expected PATH=VALUE")
    return path, yaml.safe_load(value)


if __name__ == "__main__":
    exit_with(main)

"""What can be said of vLLM's flags before it starts, as vLLM 0.32 reads them (`vllm/utils/argparse_utils.py`, `vllm/config/`)."""

import re
from collections.abc import Mapping

LENGTH_FLAG, ROWS_FLAG, SHARE_FLAG = "--max-model-len", "--max-num-seqs", "--gpu-memory-utilization"
SHARE_FLAGS = (SHARE_FLAG, "--device-memory-utilization")

UNITS = {unit: 1000**n for n, unit in enumerate("kmgt", 1)} | {unit: 1024**n for n, unit in enumerate("KMGT", 1)}

AUTOMATIC = ("auto", "-1")
"""Lengths that vLLM chooses by itself."""

NEGATIVE = re.compile(r"-\d+|-\d*\.\d+")
"""A word that is a value, although it begins with a dash, as argparse has it."""


def read_count(text: str) -> int | None:
    """Of `4096`, `4k` (thousands) or `4K` (times 1024); None for what is none."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?(?=[kmgt])|\d+)([kmgtKMGT])", text.strip())
    try:
        count = int(float(found[1]) * UNITS[found[2]]) if found else int(text)
    except (ValueError, OverflowError):
        return None
    return count if count >= 0 else None


def flag_problem(flags: Mapping[str, str]) -> str | None:
    """What vLLM would refuse of the numbers that decide what it takes; None if nothing."""
    for name, value in flags.items():
        if name == LENGTH_FLAG and value.strip().lower() not in AUTOMATIC and not read_count(value):
            return f"{name} {value!r} is no number of tokens above 0: set one, such as 4096 or 4k, or auto"
        if name == ROWS_FLAG and not read_count(value):
            return f"{name} {value!r} is no number of sequences above 0: set one, such as 64"
        if name in SHARE_FLAGS and not _is_share(value):
            return f"{name} {value!r} is no share of a device's memory: set a number above 0 and at most 1, such as 0.5"
    return None


def _is_share(text: str) -> bool:
    try:
        return 0 < float(text) <= 1
    except ValueError:
        return False

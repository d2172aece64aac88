"""What phases will need, as tables."""

import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from controller.api.run import AlignmentRun
from controller.backends.local.machine import this_machine
from controller.plan.shapes import sources
from controller.plan.sizes import PARTS, Here, PhaseSize, ZeroFiles, cpu_cache, parts, run_sizes, sentence, shown
from trainers.sizing.configs import read_configs
from trainers.sizing.machine import machine_memory
from trainers.zero_config import ZERO, zero_config

SHOWN_MODELS = 4
COLUMNS = ("phase", "models", "devices", *PARTS, "in all", "of")


def sizes_here(run: AlignmentRun, base_dir: Path) -> dict[str, PhaseSize]:
    """Of a run that has been checked, with the files and configs that can be had from this machine."""
    configs = read_configs(sources(run), base_dir)
    return run_sizes(run, configs, _zero_files(run, base_dir), here=machine_of_servers(run))


def machine_of_servers(run: AlignmentRun) -> Here | None:
    """This machine, which a vLLM takes its share of that a phase starts here; None if none does, or there are GPUs."""
    started = any(getattr(entry.spec, "starts_server", False) for entry in run.phases)
    if not started or this_machine(os.environ).gpus:
        return None
    return Here(machine_memory(), cpu_cache(os.environ))


def _zero_files(run: AlignmentRun, base_dir: Path) -> ZeroFiles:
    found = (entry.spec.parallel.deepspeed for entry in run.phases)
    named = {settings.config: settings for settings in found if settings is not None and settings.config is not None}
    return {name: zero_config(settings, base_dir)[ZERO] for name, settings in named.items()}


def row(size: PhaseSize) -> tuple[str, ...]:
    """Of a phase whose needs are known."""
    assert size.needs is not None
    of = "–" if size.of is None else shown(size.of)
    memory = size.needs.memory
    least = "" if size.needs.known else "> "
    total = least + shown(memory.total)
    return (size.phase, _models(size.needs.models), str(size.devices), *parts(memory).values(), total, of)


def _models(models: Sequence[tuple[str, int]]) -> str:
    """Each with its parameters; of many, as evaluations have them, the largest."""
    if len(models) > SHOWN_MODELS:
        return f"{len(models)} models, the largest {count(max(parameters for _, parameters in models))}"
    return ", ".join(f"{name} {count(parameters)}" for name, parameters in models)


def count(parameters: int) -> str:
    """`7.62B`, `135M`, `13k`."""
    for size, unit in ((10**9, "B"), (10**6, "M"), (10**3, "k")):
        if parameters >= size:
            return f"{parameters / size:.3g}{unit}"
    return str(parameters)


def misfits(sizes: Iterable[PhaseSize]) -> list[str]:
    """What does not fit, and what would."""
    return [f"{size.phase} {sentence(size)}" for size in sizes if size.fits is False]


def fewer_rows(sizes: Iterable[PhaseSize]) -> list[str]:
    """What fits with fewer responses side by side than it asks for, and takes longer."""
    return [f"{size.phase} {sentence(size)}" for size in sizes if size.rows is not None and size.fits is not False]


def remarks(sizes: Sequence[PhaseSize]) -> list[str]:
    """What does not fit, and what is not known."""
    said = [*misfits(sizes), *fewer_rows(sizes)]
    said += [f"{size.phase} {sentence(size)}" for size in sizes if size.fits is None and size.server_unknown]
    for reason in dict.fromkeys(size.unknown for size in sizes if size.unknown):
        phases = ", ".join(size.phase for size in sizes if size.unknown == reason)
        said.append(f"what {phases} will need is not known: {reason}")
    return said


def plain_lines(sizes: Sequence[PhaseSize]) -> list[str]:
    """Fixed columns, for logs."""
    rows = [COLUMNS, *(row(size) for size in sizes if size.needs is not None)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)).rstrip() for cells in rows]


def markdown_lines(sizes: Sequence[PhaseSize]) -> list[str]:
    """For pages."""
    rule = ["---"] * 2 + ["---:"] * (len(COLUMNS) - 2)
    rows = [COLUMNS, rule, *(row(size) for size in sizes if size.needs is not None)]
    return [f"| {' | '.join(cells)} |" for cells in rows]

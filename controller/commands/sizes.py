"""What phases will need, as tables."""

from collections.abc import Sequence

from controller.plan.sizes import PARTS, PhaseSize, parts, sentence, shown

SHOWN_MODELS = 4
COLUMNS = ("phase", "models", "devices", *PARTS, "in all", "of")


def row(size: PhaseSize) -> tuple[str, ...]:
    """Of a phase whose needs are known."""
    assert size.needs is not None
    of = "?" if size.device.memory is None else shown(size.device.memory)
    memory = size.needs.memory
    least = "" if size.needs.activations_known else "> "
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


def remarks(sizes: Sequence[PhaseSize]) -> list[str]:
    """What does not fit, and what is not known."""
    said = [f"{size.phase} {sentence(size)}" for size in sizes if size.fits is False]
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

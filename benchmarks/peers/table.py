"""Figures as the tables of docs/benchmarks.md: medians of the rounds, with the least and the most."""

from collections.abc import Callable, Iterable
from statistics import median

from figures import BEHIND, CLOCK, PROCESSOR, Sampled, Side, Work, peer_wins

BEGIN, END = "<!-- what follows is written by make {} -->", "<!-- until here -->"

NAMES = {
    "sft": "SFT", "reward": "reward model", "dpo": "DPO", "traces": "distillation on traces", "ppo": "PPO",
    "samples": "distillation on own samples",
}  # fmt: skip

SPEED = (
    "work", "batch", "ours, tokens per CPU-second", "TRL, tokens per CPU-second", "ratio to its best",
    "ours, tokens per second", "TRL, its best, tokens per second", "ratio",
)  # fmt: skip
COSTS = (
    "work", "batch", "peak MB, ours / TRL", "CPU-seconds to the first step, ours / TRL", "seconds to it, ours / TRL",
    "our step", "TRL's step",
)  # fmt: skip
SAMPLING = (
    "rows", "lengths", "ours, tokens per CPU-second", "`generate`, tokens per CPU-second", "ratio",
    "ours, tokens per second", "`generate`, tokens per second", "ratio", "of its roof, ours / `generate`",
)  # fmt: skip


def render(works: list[Work], sampled: list[Sampled], device: str) -> str:
    """All tables. What counts on a GPU is the clock."""
    column = PROCESSOR if device == "cpu" else CLOCK
    tables: list[str] = []
    if works:
        tables.append(_table(SPEED, (line for work in works for line in speed(work, column))))
        tables.append(_table(COSTS, (costs(work, column) for work in works)))
    if sampled:
        tables.append(_table(SAMPLING, (line for row in sampled for line in sampling(row, column))))
    behind = peer_wins(works, sampled, column, NAMES)
    return "\n\n".join([*tables, f"Where the peer wins: {'; '.join(behind) if behind else 'nowhere in these tables'}."])


def speed(work: Work, column: int) -> list[str]:
    best = work.best(CLOCK)[1]
    cells = [
        NAMES[work.kind], str(work.batch), spread(work.ours.rates(PROCESSOR)),
        " / ".join(f"{spread(side.rates(PROCESSOR))}{_how(name)}" for name, side in work.theirs.items()),
        _ratio(work.ratios(PROCESSOR)), spread(work.ours.rates(CLOCK)), spread(best.rates(CLOCK)), _ratio(work.ratios(CLOCK)),
    ]  # fmt: skip
    return [_line(cells), *_roof_line(work.roofs, [f"{NAMES[work.kind]}, the roof", str(work.batch)], column, 1)]


def costs(work: Work, column: int) -> str:
    name, best = work.best(column)
    cells = [
        NAMES[work.kind] + _how(name), str(work.batch), _both(work, best, lambda side: side.peak, 0),
        _both(work, best, lambda side: side.start(PROCESSOR), 1), _both(work, best, lambda side: side.start(CLOCK), 1),
        _shares(work.ours), _shares(best),
    ]  # fmt: skip
    return _line(cells)


def sampling(row: Sampled, column: int) -> list[str]:
    own, its = (spread(row.rates(name, PROCESSOR)) for name in ("ours", "generate"))
    clock = (spread(row.rates(name, CLOCK)) for name in ("ours", "generate"))
    of_roof = " / ".join(
        f"{median(row.rates(name, column)) / row.roofs[by]:.2f}"
        for name, by in zip(("ours", "generate"), _roofs_of(row.roofs), strict=True)
    )
    cells = [
        str(row.batch), row.lengths, own, its, _ratio(row.ratios(PROCESSOR)), *clock, _ratio(row.ratios(CLOCK)), of_roof,
    ]  # fmt: skip
    return [_line(cells), *_roof_line(row.roofs, [str(row.batch), f"{row.lengths}, the roof"], column, 2)]


def spliced(text: str, name: str, made: str) -> str:
    """A page with what one command writes in the place of what it wrote before. Raises ValueError where its marks are not."""
    begin = BEGIN.format(name)
    before, found, rest = text.partition(begin)
    _, ended, after = rest.partition(END)
    if not (found and ended):
        raise ValueError(f"the page has no lines {begin!r} and {END!r}")
    return f"{before}{begin}\n\n{made.strip()}\n\n{END}{after}"


def spread(values: list[float]) -> str:
    return f"{median(values):,.0f} ({min(values):,.0f}–{max(values):,.0f})"


def _ratio(values: list[float]) -> str:
    wins = " (the peer wins)" if median(values) < BEHIND else ""
    return f"**{median(values):.2f}** ({min(values):.2f}–{max(values):.2f}){wins}"


def _how(name: str) -> str:
    """What is said of a side that is not as it comes."""
    how = name.partition(" ")[2]
    return f" {how}" if how else ""


def _both(work: Work, best: Side, figure: Callable[[Side], float], digits: int) -> str:
    return f"{figure(work.ours):,.{digits}f} / {figure(best):,.{digits}f}"


def _shares(side: Side) -> str:
    return ", ".join(f"{name} {share:.2f}" for name, share in side.split().items() if share >= 0.005)


def _roof_line(roofs: dict[str, float], what: list[str], column: int, last: int) -> list[str]:
    """The roof as a row, in the places of the figures that it is above; none where it was not measured."""
    if not roofs:
        return []
    roof = [f"{roofs[name]:,.0f} ({name})" for name in _roofs_of(roofs)]
    nothing = ["", "", ""]
    return [_line([*what, *([*roof, *nothing] if column == PROCESSOR else [*nothing, *roof]), *[""] * last])]


def _roofs_of(roofs: dict[str, float]) -> tuple[str, str]:
    """What multiplies for ours, which takes the best there is, and for theirs, which takes what torch does by itself."""
    return max(roofs, key=roofs.__getitem__), next(iter(roofs))


def _table(head: Iterable[str], lines: Iterable[str]) -> str:
    names = list(head)
    return "\n".join([_line(names), _line(["---"] * len(names)), *lines])


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"

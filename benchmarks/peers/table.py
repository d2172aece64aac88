"""Figures as the table of docs/benchmarks.md: medians of the rounds, with the least and the most."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from statistics import median
from typing import Any

BEGIN, END = "<!-- what follows is written by make {} -->", "<!-- until here -->"

NAMES = {
    "sft": "SFT", "reward": "reward model", "dpo": "DPO", "traces": "distillation on traces", "ppo": "PPO",
    "samples": "distillation on own samples",
}  # fmt: skip

WARM_UP = 2
"""Steps at the start that are left out: they import, allocate and look things up."""


@dataclass
class Side:
    """What one program did of a kind of work: its rounds."""

    rounds: list[dict[str, Any]] = field(default_factory=list)

    def rates(self, column: int) -> list[float]:
        """Tokens per second of the processor (0) or of the clock (1), of each round."""
        return [_rate(found["marks"], column) for found in self.rounds]

    @property
    def peak(self) -> float:
        return median(found["peak"] for found in self.rounds)

    @property
    def start(self) -> float:
        """Seconds of the processor from the start of the program to the end of its first step, imports included."""
        return median(found["marks"][0][0] - found["began"][0] + found["imports"][0] for found in self.rounds)

    @property
    def loss(self) -> float | None:
        return self.rounds[0]["loss"]

    def split(self) -> str:
        """Shares of the steps, the largest first."""
        sums: dict[str, float] = {}
        for part in (part for found in self.rounds for part in found.get("parts", [])[WARM_UP:]):
            for name, seconds in part.items():
                sums[name] = sums.get(name, 0) + seconds
        whole = sum(sums.values())
        return ", ".join(
            f"{name} {sums[name] / whole:.2f}" for name in sorted(sums, key=sums.__getitem__, reverse=True)
        )


@dataclass
class Work:
    kind: str
    batch: int
    device: str
    sides: dict[str, Side]
    """By name, ours first."""

    @property
    def column(self) -> int:
        """What figures are by: seconds of a processor, which others' work does not change; of a GPU those of the clock."""
        return 0 if self.device == "cpu" else 1

    def line(self) -> str:
        ours, column = self.sides["ours"], self.column
        best = max(self.theirs(), key=lambda side: median(side.rates(column)))
        ratio = _ratio(ours, best, column)
        cells = [
            NAMES[self.kind], str(self.batch), _spread(ours.rates(column)),
            " / ".join(_spread(side.rates(column)) for side in self.theirs()),
            f"**{ratio:.2f}**" + (" (the peer wins)" if ratio < 1 else ""), f"{_ratio(ours, best, 1):.2f}",
            f"{ours.peak:.0f} / {best.peak:.0f}", f"{ours.start:.1f} / {best.start:.1f}", ours.split(),
        ]  # fmt: skip
        return _line(cells)

    def theirs(self) -> list[Side]:
        return [side for name, side in self.sides.items() if name != "ours"]

    def losses(self) -> str:
        """Those of the first step."""
        return ", ".join(f"{name} {side.loss:.6f}" for name, side in self.sides.items() if side.loss is not None)


HEAD = (
    "work", "batch", "ours, tokens per {}", "TRL (/ grouped by length)", "ratio to the best", "by the clock",
    "peak MB, ours / TRL", "CPU-s to the first step, ours / TRL", "where our step's time goes",
)  # fmt: skip


def render(works: Iterable[Work], device: str) -> str:
    head = [cell.format("CPU-second" if device == "cpu" else "second") for cell in HEAD]
    return "\n".join([_line(head), _line(["---"] * len(head)), *(work.line() for work in works)])


def spliced(text: str, name: str, made: str) -> str:
    """A page with what one command writes in the place of what it wrote before. Raises ValueError where its marks are not."""
    begin = BEGIN.format(name)
    before, found, rest = text.partition(begin)
    _, ended, after = rest.partition(END)
    if not (found and ended):
        raise ValueError(f"the page has no lines {begin!r} and {END!r}")
    return f"{before}{begin}\n\n{made.strip()}\n\n{END}{after}"


def _rate(marks: list[list[float]], column: int) -> float:
    first, last = marks[WARM_UP - 1], marks[-1]
    return (last[2] - first[2]) / (last[column] - first[column])


def _ratio(ours: Side, theirs: Side, column: int) -> float:
    """Of the rounds' ratios, the median: what is noise to both falls out of it."""
    return median(a / b for a, b in zip(ours.rates(column), theirs.rates(column), strict=True))


def _spread(values: list[float]) -> str:
    return f"{median(values):,.0f} ({min(values):,.0f}–{max(values):,.0f})"


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"

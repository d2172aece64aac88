"""The run's graph as a small SVG: columns by how much came before, an arrow for every reference."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from trainers.phases.package.gather import STARTS, Phase, Run

COLUMN, ROW = 168, 54
WIDTH, HEIGHT = 128, 36
MARGIN = 8


@dataclass(frozen=True)
class Box:
    name: str
    type: str
    x: int
    y: int


def graph(run: Run) -> Mapping[str, Any]:
    """Boxes and arrows with their places; the template draws them."""
    shown = [phase for phase in run.phases.values() if phase.type != "evaluate"]
    depth: dict[str, int] = {}
    for phase in shown:
        depth[phase.name] = 1 + max((depth[e.phase] for e in phase.edges if e.phase in depth), default=-1)
    boxes = _boxes(shown, depth)
    by_name = {box.name: box for box in boxes}
    arrows = [
        {"path": _path(by_name[edge.phase], by_name[phase.name]), "role": edge.role, "start": edge.role in STARTS}
        for phase in shown
        for edge in phase.edges
        if edge.phase in by_name
    ]
    width = max((box.x for box in boxes), default=0) + WIDTH + MARGIN
    height = max((box.y for box in boxes), default=0) + HEIGHT + MARGIN
    return {"boxes": boxes, "arrows": arrows, "width": width, "height": height, "box": (WIDTH, HEIGHT)}


def _boxes(phases: list[Phase], depth: Mapping[str, int]) -> list[Box]:
    rows: dict[int, int] = {}
    boxes = []
    for phase in phases:
        column = depth[phase.name]
        row = rows.get(column, 0)
        rows[column] = row + 1
        # Every other column half a row lower, so that a straight arrow does not run through a box between.
        boxes.append(Box(phase.name, phase.type, MARGIN + column * COLUMN, MARGIN + row * ROW + column % 2 * ROW // 2))
    return boxes


def _path(source: Box, target: Box) -> str:
    x0, y0 = source.x + WIDTH, source.y + HEIGHT // 2
    x1, y1 = target.x - 6, target.y + HEIGHT // 2
    bend = (x1 - x0) // 2
    return f"M{x0},{y0} C{x0 + bend},{y0} {x1 - bend},{y1} {x1},{y1}"

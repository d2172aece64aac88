"""Colours and texts of states."""

from collections.abc import Iterable, Mapping

from controller.api.status import PhaseState
from controller.operator.metrics import RUN_STATES
from generate.dashboards.panels import override
from generate.dashboards.query import Object, operator

COLORS = {
    "Waiting": "#6e7687",
    "Ready": "#8ab8ff",
    "Queued": "yellow",
    "Running": "#5794f2",
    "BackingOff": "orange",
    "Suspended": "purple",
    "Stalled": "dark-orange",
    "Succeeded": "green",
    "Failed": "red",
    "Blocked": "dark-yellow",
    "NotSelected": "#4a4f5a",
}
"""A state's colour is the same everywhere."""

PHASE_NUMBERS: dict[str, int] = {state: number for number, state in enumerate(PhaseState)}
RUN_NUMBERS = {state: number for number, state in enumerate(RUN_STATES)}
"""Panels that show one state of many count them; mappings turn the numbers back into words."""


def texts(states: Iterable[str]) -> list[Object]:
    """Value mapping of states that are words already."""
    results = {state: {"text": state, "color": COLORS[state], "index": i} for i, state in enumerate(states)}
    return [{"type": "value", "options": results}]


def numbered(numbers: Mapping[str, int]) -> list[Object]:
    """Value mapping of numbers that stand for states."""
    results = {str(n): {"text": state, "color": COLORS[state], "index": n} for state, n in numbers.items()}
    return [{"type": "value", "options": results}]


RUN_TEXTS = texts(RUN_STATES)
PHASE_TEXTS = texts(PhaseState)


def state_of(metric: str, selector: str, numbers: Mapping[str, int], by: str) -> str:
    """One series per ``by``, whose value is the number of the state that it is in."""

    def of(state: str) -> str:
        return operator(metric, f'{selector}, state="{state}"')

    return " or ".join(f"max by ({by}) ({of(state)}) * {number}" for state, number in numbers.items())


def colored(states: Iterable[str]) -> list[Object]:
    """Overrides for series that are named after states."""
    return [override(state, color={"mode": "fixed", "fixedColor": COLORS[state]}) for state in states]

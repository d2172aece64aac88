"""The curves of a real quickstart, as if each of its steps took minutes: nothing may fire on a healthy run.

quickstart.json has up to sixty points of each phase of one `make quickstart`. Its tokens are those of a step, which are
tokens per second when all steps take the same time.
"""

import json
from pathlib import Path

from alerts.scenario import PHASE, Scenario, Series, running, silent, trainer

PHASES = json.loads(Path(__file__).with_suffix(".json").read_text())
ABOUT = {
    "ppo": ("AlignmentKlExploded", "AlignmentRewardOveroptimized", "AlignmentThroughputHalved"),
    "distill": ("AlignmentKlExploded", "AlignmentLossExploded"),
}


def replay(phase: str, minutes: int) -> Series:
    """``minutes`` a step."""
    labels = {**PHASE, "phase": phase, "type": PHASES[phase]["type"]}
    series = {**running(labels=labels)}
    for name, values in PHASES[phase]["curves"].items():
        held = " ".join(str(value) for value in values for _ in range(minutes))
        series |= trainer(name, held, labels, f"helpful-{phase}-1-worker-0")
    return series


SCENARIOS = tuple(
    Scenario(
        f"quickstart's {phase} with {minutes} minutes a step",
        replay(phase, minutes),
        silent(*range(5, 60 * minutes, 5 * minutes)),
        nearly=ABOUT.get(phase, ()),
    )
    for phase in PHASES
    for minutes in (1, 5)
)

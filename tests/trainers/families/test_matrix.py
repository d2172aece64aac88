"""The matrix: every family in every phase and precision.

`make test` runs a part that touches every row and column, in both precisions; `make test-families` the whole.
"""

import pytest
from families import matrix
from families.architectures import FAMILIES

PRECISIONS = ("fp32", "bf16")
CELLS = [(family, phase, precision) for family in FAMILIES for phase in matrix.PHASES for precision in PRECISIONS]


def in_short(family: str, phase: str, precision: str) -> bool:
    """Two phases of each family, one of them in each precision; every phase comes up in both."""
    i, j = list(FAMILIES).index(family), list(matrix.PHASES).index(phase)
    return (i + j) % 4 == 0 and PRECISIONS.index(precision) == (i // 4 + j // 4) % 2


def cells():
    for cell in CELLS:
        yield pytest.param(*cell, marks=() if in_short(*cell) else pytest.mark.families, id="-".join(cell))


@pytest.mark.parametrize(("family", "phase", "precision"), cells())
def test_cell(family, phase, precision, family_dirs, run_phase, stop_after, tmp_path):
    model, reward_model = family_dirs(family)
    cell = matrix.Cell(model, reward_model, precision, tmp_path, run_phase, stop_after)
    matrix.PHASES[phase](cell)


def test_the_short_form_touches_every_row_and_column():
    short = [cell for cell in CELLS if in_short(*cell)]
    assert {(family, precision) for family, _, precision in short} == {(f, p) for f in FAMILIES for p in PRECISIONS}
    assert {(phase, precision) for _, phase, precision in short} == {(f, p) for f in matrix.PHASES for p in PRECISIONS}

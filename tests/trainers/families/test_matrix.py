"""The matrix: every family in every phase and precision.

`make test` runs a part that touches every row and column, in both precisions; `make test-families` the whole.
"""

import pytest
from families import matrix
from families.architectures import FAMILIES, documented

PRECISIONS = ("fp32", "bf16")
CELLS = [(family, phase, precision) for family in FAMILIES for phase in matrix.PHASES for precision in PRECISIONS]


def in_short(family: str, phase: str, precision: str) -> bool:
    """Two phases of each family, one of them in each precision; every phase comes up in both."""
    i, j = list(FAMILIES).index(family), list(matrix.PHASES).index(phase)
    return (i + j) % 4 == 0 and PRECISIONS.index(precision) == (i // 4 + j // 4) % 2


CASES = [
    pytest.param(*cell, marks=() if in_short(*cell) else pytest.mark.families, id="-".join(cell)) for cell in CELLS
]


@pytest.mark.parametrize(("family", "phase", "precision"), CASES)
def test_cell(family, phase, precision, family_dirs, run_phase, stop_after, tmp_path, capsys):
    model, classifier = family_dirs(family)
    expected = documented()[family][phase]
    if expected == "other":
        classifier = family_dirs("llama")[1]
    cell = matrix.Cell(model, classifier, precision, tmp_path, run_phase, stop_after)
    if expected == "refused":
        with pytest.raises(matrix.Refused):
            matrix.PHASES[phase](cell)
        assert f"BadInput: models of type {family} have no" in capsys.readouterr().err
    else:
        matrix.PHASES[phase](cell)


def test_the_table_has_every_family_and_phase():
    rows = documented()
    assert list(rows) == list(FAMILIES)
    assert all(list(row) == ["packing", "balance loss", *matrix.PHASES] for row in rows.values())


def test_the_short_form_touches_every_row_and_column():
    short = [cell for cell in CELLS if in_short(*cell)]
    assert {(family, precision) for family, _, precision in short} == {(f, p) for f in FAMILIES for p in PRECISIONS}
    assert {(phase, precision) for _, phase, precision in short} == {(f, p) for f in matrix.PHASES for p in PRECISIONS}
